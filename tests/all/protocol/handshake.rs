//! The handshake and authorisation: what is greeted how, and who may come in.

use std::time::Duration;

use sflllm::protocol::codec::{
    Answer, DecodeError, Frame, GreetingError, MAX_HANDSHAKE_BYTES, decode_answer, decode_hello, encode_answer,
    encode_frame, encode_hello, encode_message,
};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::terms::ids::{ClientId, RunId};
use sflllm::terms::tensor::WireForm;

use super::peer::*;

#[test]
fn every_pair_of_versions_gives_a_typed_result() {
    let versions = || (0..4).flat_map(|major| (0..4).map(move |minor| Version { major, minor }));
    for ours in versions() {
        for theirs in versions() {
            let mut main = MainServerSession::new(
                MainConfig {
                    version: theirs,
                    ..main_config(1)
                },
                Duration::ZERO,
            )
            .unwrap();
            let config = ClientConfig {
                version: ours,
                ..client_config()
            };
            let mut client = ClientSession::new(config, Duration::ZERO);
            assert!(matches!(client.poll_event(), Some(ClientEvent::Connect { .. })));
            client.connected(Endpoint::Main, Duration::ZERO);
            main.connected(ConnectionId(1), Duration::ZERO);
            let Some(Transmit::Frame { bytes, .. }) = client.poll_transmit() else {
                panic!("no greeting")
            };
            main.handle_frame(ConnectionId(1), Duration::ZERO, &bytes);
            let Some(Transmit::Frame { bytes, .. }) = main.poll_transmit() else {
                panic!("no answer")
            };
            client.handle_frame(Endpoint::Main, Duration::ZERO, &bytes);
            if ours.major == theirs.major {
                let Ok(Answer::Welcome(welcome)) = decode_answer(ours, &bytes) else {
                    panic!("{ours} {theirs}")
                };
                assert_eq!(welcome.version, ours.min(theirs));
                assert_eq!(client.client(), Some(ClientId(1)));
            } else {
                let Some(ClientEvent::Failed(ClientFailure::Refused { refused, .. })) = client.poll_event() else {
                    panic!("{ours} at {theirs} is not refused");
                };
                assert_eq!((refused.reason, refused.version), (RefusalReason::Version, theirs));
                let refused = MainEvent::ClientRefused {
                    connection: ConnectionId(1),
                    reason: RefusalReason::Version,
                };
                assert_eq!(main.poll_event(), Some(refused));
            }
        }
    }
}

#[test]
fn a_newer_minor_may_append_to_its_greeting_and_an_older_may_not() {
    let mut hello = hello(Service::Main, Credential::None);
    hello.version.minor += 1;
    let mut bytes = encode_hello(&hello);
    bytes.extend([1, 2, 3]);
    assert_eq!(decode_hello(PROTOCOL_VERSION, &bytes), Ok(hello.clone()));
    let error = decode_hello(hello.version, &bytes);
    assert_eq!(error, Err(GreetingError::Malformed(DecodeError::Trailing(3))));
}

#[test]
fn nothing_but_a_greeting_is_parsed_first() {
    let (kind, body) = encode_message(&Message::Activations(good_activations()));
    let message = encode_frame(Frame::Message {
        number: 0,
        acknowledged: 0,
        kind,
        body: &body,
    });
    let mut cut = encode_hello(&hello(Service::Main, secret()));
    cut.truncate(cut.len() - 1);
    let mut huge = encode_hello(&hello(Service::Main, secret()));
    huge.resize(MAX_HANDSHAKE_BYTES + 1, 0);
    let answer = encode_answer(&Answer::Refused(Refused {
        version: PROTOCOL_VERSION,
        reason: RefusalReason::Full,
        detail: String::new(),
    }));
    for (bytes, reason) in [
        (message, RefusalReason::NotThisProtocol),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), RefusalReason::NotThisProtocol),
        (Vec::new(), RefusalReason::NotThisProtocol),
        (answer, RefusalReason::NotThisProtocol),
        (cut, RefusalReason::Malformed),
        (huge, RefusalReason::Malformed),
    ] {
        let mut main = MainServerSession::new(main_config(1), Duration::ZERO).unwrap();
        main.connected(ConnectionId(1), Duration::ZERO);
        main.handle_frame(ConnectionId(1), Duration::ZERO, &bytes);
        assert_eq!(refusal(&listen(&mut main, ConnectionId(1))), Some(reason));
        assert_eq!(
            events(&mut main),
            [MainEvent::ClientRefused {
                connection: ConnectionId(1),
                reason
            }]
        );
        assert!(main.status().clients.is_empty());
    }
}

#[test]
fn a_run_with_alphas_of_its_own_takes_no_client_that_cannot_read_them() {
    let own = || OwnAlpha {
        block: 0,
        target: "attn.c_attn".to_owned(),
        alpha: 3.0,
    };
    let of = |version| Hello {
        version,
        ..hello(Service::Main, secret())
    };
    let old = Version { major: 3, minor: 0 };
    for (version, alphas, reason) in [
        (old, true, Some(RefusalReason::Version)),
        (old, false, None),
        (ALPHAS_SINCE, true, None),
        (PROTOCOL_VERSION, true, None),
    ] {
        let mut config = main_config(1);
        config.placement.assignment.alphas = if alphas { vec![own()] } else { Vec::new() };
        let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
        let transmits = greet(&mut main, 1, Duration::ZERO, &of(version));
        assert_eq!(refusal(&transmits), reason, "{version} {alphas}");
    }
}

#[test]
fn a_client_that_does_not_fit_the_run_is_told_why() {
    let other = Some(Digest::of(b"other"));
    let base = || hello(Service::Main, secret());
    let weak = Capabilities {
        forms: vec![WireForm::Int8],
        ..capabilities()
    };
    for (hello, reason) in [
        (Hello { model: other, ..base() }, RefusalReason::Model),
        (
            Hello {
                tokenizer: other,
                ..base()
            },
            RefusalReason::Tokenizer,
        ),
        (
            Hello {
                capabilities: weak,
                ..base()
            },
            RefusalReason::WireForm,
        ),
        (
            Hello {
                service: Service::Federated,
                ..base()
            },
            RefusalReason::Service,
        ),
        (
            Hello {
                service: Service::Control,
                ..base()
            },
            RefusalReason::Service,
        ),
    ] {
        let mut main = MainServerSession::new(main_config(1), Duration::ZERO).unwrap();
        assert_eq!(refusal(&greet(&mut main, 1, Duration::ZERO, &hello)), Some(reason));
    }
    let fitting = Hello {
        model: Some(Digest::of(b"model")),
        ..base()
    };
    let mut main = MainServerSession::new(
        MainConfig {
            max_clients: 1,
            ..main_config(1)
        },
        Duration::ZERO,
    )
    .unwrap();
    welcome(&greet(&mut main, 1, Duration::ZERO, &fitting));
    assert_eq!(
        refusal(&greet(&mut main, 2, Duration::ZERO, &fitting)),
        Some(RefusalReason::Full)
    );
}

#[test]
fn a_connection_that_never_greets_is_closed() {
    let mut main = MainServerSession::new(main_config(1), Duration::ZERO).unwrap();
    main.connected(ConnectionId(1), Duration::ZERO);
    let deadline = main.poll_timeout().unwrap();
    assert!(deadline <= seconds(20));
    main.handle_timeout(deadline);
    assert_eq!(main.poll_transmit(), Some(Transmit::Close { to: ConnectionId(1) }));
}

// Authorisation.

#[test]
fn the_main_service_takes_its_own_unspent_tickets_and_its_secret_only() {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let attempt = |main: &mut MainServerSession, number, now, credential| {
        greet(main, number, now, &hello(Service::Main, credential))
    };
    let wrong = Credential::Secret("open sesamf".to_owned());
    assert_eq!(
        refusal(&attempt(&mut main, 1, seconds(0), wrong)),
        Some(RefusalReason::SecretWrong)
    );
    let none = attempt(&mut main, 2, seconds(0), Credential::None);
    assert_eq!(refusal(&none), Some(RefusalReason::SecretMissing));

    let first = welcome(&attempt(&mut main, 3, seconds(0), secret()));
    let by = |ticket: &Ticket| Credential::Ticket(ticket.clone());

    let mut forged = first.ticket.clone();
    forged.0[17] ^= 1;
    assert_eq!(
        refusal(&attempt(&mut main, 4, seconds(1), by(&forged))),
        Some(RefusalReason::TicketForged)
    );
    let federated = first.federated_ticket.clone().unwrap();
    assert_eq!(
        refusal(&attempt(&mut main, 5, seconds(1), by(&federated))),
        Some(RefusalReason::TicketForged),
        "a ticket for the federated service opens the federated service only"
    );
    assert_eq!(
        refusal(&attempt(&mut main, 6, seconds(3600), by(&first.ticket))),
        Some(RefusalReason::TicketExpired)
    );
    let other_run = MainConfig {
        run: RunId([9; 16]),
        placement: Placement {
            assignment: assignment(RunId([9; 16])),
            ..main_config(1).placement
        },
        ..main_config(9)
    };
    let mut other = MainServerSession::new(other_run, Duration::ZERO).unwrap();
    assert_eq!(
        refusal(&attempt(&mut other, 1, seconds(1), by(&first.ticket))),
        Some(RefusalReason::TicketOtherRun)
    );

    let second = welcome(&attempt(&mut main, 7, seconds(1), by(&first.ticket)));
    assert_eq!(second.client, first.client, "a ticket keeps the client's number");
    // The bearer speaks: from here on the ticket it came with is spent.
    Peer {
        connection: ConnectionId(7),
        sent: 0,
        received: 1,
    }
    .ping(&mut main, seconds(2));
    assert_eq!(
        refusal(&attempt(&mut main, 8, seconds(3), by(&first.ticket))),
        Some(RefusalReason::TicketSpent)
    );
    let third = welcome(&attempt(&mut main, 9, seconds(3), by(&second.ticket)));
    assert_eq!(third.client, first.client);
    assert_eq!(
        main.status().clients.len(),
        1,
        "one client, however often it reconnects"
    );

    let failures = events(&mut main)
        .into_iter()
        .filter(|event| matches!(event, MainEvent::ClientRefused { reason, .. } if reason.is_authorisation_failure()))
        .count();
    assert_eq!(
        failures, 6,
        "each failed attempt is reported, for the socket layer to limit"
    );
}

#[test]
fn the_federated_service_takes_the_main_services_tickets_once() {
    let mut main = MainServerSession::new(main_config(9), seconds(1000)).unwrap();
    let mut federated = FederatedServerSession::new(federated_config());
    let said = greet(&mut main, 1, seconds(1000), &hello(Service::Main, secret()));
    let ticket = welcome(&said).federated_ticket.unwrap();
    let attempt = |federated: &mut FederatedServerSession, number, now, credential| {
        greet(federated, number, now, &hello(Service::Federated, credential))
    };
    let by = |ticket: &Ticket| Credential::Ticket(ticket.clone());
    assert_eq!(
        refusal(&attempt(&mut federated, 1, seconds(0), by(&ticket))),
        Some(RefusalReason::NoRun)
    );
    // The two servers' clocks differ by a thousand seconds.
    while let Some(control) = main.poll_control() {
        federated.handle_control(seconds(0), control);
    }
    assert_eq!(
        refusal(&attempt(&mut federated, 2, seconds(0), secret())),
        Some(RefusalReason::TicketForged)
    );
    let main_ticket = welcome(&said).ticket;
    assert_eq!(
        refusal(&attempt(&mut federated, 3, seconds(0), by(&main_ticket))),
        Some(RefusalReason::TicketForged)
    );
    assert_eq!(
        refusal(&attempt(&mut federated, 4, seconds(3600), by(&ticket))),
        Some(RefusalReason::TicketExpired)
    );
    let inside = welcome(&attempt(&mut federated, 5, seconds(3599), by(&ticket)));
    Peer {
        connection: ConnectionId(5),
        sent: 0,
        received: 0,
    }
    .ping(&mut federated, seconds(3599));
    assert_eq!(
        refusal(&attempt(&mut federated, 6, seconds(3599), by(&ticket))),
        Some(RefusalReason::TicketSpent)
    );
    assert_eq!(
        welcome(&attempt(&mut federated, 7, seconds(3599), by(&inside.ticket))).client,
        inside.client
    );
}

#[test]
fn a_remote_main_server_needs_the_secret_and_a_local_one_cannot_be_impersonated() {
    let control = |credential| hello(Service::Control, credential);
    let mut local = FederatedServerSession::new(federated_config());
    assert_eq!(
        refusal(&greet(&mut local, 1, Duration::ZERO, &control(secret()))),
        Some(RefusalReason::Service)
    );
    let access = ControlAccess::Remote {
        secret: Some(SECRET.to_owned()),
    };
    let mut remote = FederatedServerSession::new(FederatedConfig {
        control: access,
        ..federated_config()
    });
    assert_eq!(
        refusal(&greet(&mut remote, 1, Duration::ZERO, &control(Credential::None))),
        Some(RefusalReason::SecretMissing)
    );
    welcome(&greet(&mut remote, 2, Duration::ZERO, &control(secret())));
}
