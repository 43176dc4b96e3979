//! What the two servers and a client owe each other: handshake, authorisation, joining, liveness, membership, pairing.
//!
//! The first half talks to one session frame by frame, as a peer that need not be honest. The second half runs whole
//! training runs in virtual time, over networks that lose, repeat and reorder.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use sflllm::protocol::codec::{
    self, Answer, DecodeError, Frame, GreetingError, MAX_HANDSHAKE_BYTES, decode_answer, decode_frame, decode_hello,
    decode_message, encode_answer, encode_frame, encode_hello, encode_message,
};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Outcome, Phase, Scenario, Weather, simulate};
use sflllm::terms::format::Format;
use sflllm::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use sflllm::terms::moments::{MomentPolicy, Moments};
use sflllm::terms::optimizer::{OptimizerSettings, Schedule};
use sflllm::terms::speed::Speed;
use sflllm::terms::tensor::{IGNORED_TARGET, WireForm, WireLayout, WireTensor};

const SECRET: &str = "open sesame";
const ADAPTER: [f32; 4] = [0.5, -0.25, 2.0, 0.0];

const READY: Message = Message::Ready(Ready {
    assignment: 0,
    speed: None,
});

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn capabilities() -> Capabilities {
    Capabilities {
        forms: vec![WireForm::F32],
        memory_bytes: 1 << 30,
        device: "test".to_owned(),
    }
}

/// Batch 2, sequence 3, width 2, vocabulary 10; two rounds of two steps.
fn assignment(run: RunId) -> Assignment {
    Assignment {
        run,
        number: 0,
        config: RunConfig {
            split: 1,
            rank: 1,
            alpha: 2.0,
            targets: vec!["c_attn".to_owned()],
            weights: Format::F16,
            wire: WireForm::F32,
            batch: 2,
            seq: 3,
            width: 2,
            vocab: 10,
            seed: 1,
            shuffle: true,
            local_steps: 2,
            rounds: 2,
            optimizer: OptimizerSettings {
                lr: 1e-3,
                weight_decay: 0.01,
                schedule: Schedule::Linear,
                warmup: 1,
                total_steps: 4,
                clip: Some(1.0),
            },
            moments: MomentPolicy::Keep,
        },
        model_config: "{}".to_owned(),
        weights: Vec::new(),
        tokenizer: Vec::new(),
        adapter_len: ADAPTER.len() as u64,
    }
}

fn main_config(clients: u32) -> MainConfig {
    let run = RunId([1; 16]);
    MainConfig {
        version: PROTOCOL_VERSION,
        run,
        ticket_key: [2; 32],
        ticket_lifetime: seconds(3600),
        secret: Some(SECRET.to_owned()),
        clients,
        max_clients: 100,
        placement: Placement {
            assignment: assignment(run),
            adapter: ADAPTER.to_vec(),
            moments: None,
            cuts: BTreeMap::new(),
        },
        largest_update: ADAPTER.len() as u64,
        plans: false,
        model: Digest::of(b"model"),
        tokenizer: Digest::of(b"tokenizer"),
        federated_url: None,
        ping_interval: PING_INTERVAL,
        wait_for_client: seconds(60),
    }
}

fn federated_config() -> FederatedConfig {
    FederatedConfig {
        version: PROTOCOL_VERSION,
        control: ControlAccess::Local,
        max_clients: 100,
        ping_interval: PING_INTERVAL,
    }
}

fn client_config() -> ClientConfig {
    ClientConfig {
        version: PROTOCOL_VERSION,
        name: "Ada".to_owned(),
        capabilities: capabilities(),
        model: None,
        tokenizer: None,
        secret: Some(SECRET.to_owned()),
        retries: 3,
    }
}

fn hello(service: Service, credential: Credential) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        service,
        credential,
        name: "Ada".to_owned(),
        model: None,
        tokenizer: None,
        capabilities: capabilities(),
    }
}

fn secret() -> Credential {
    Credential::Secret(SECRET.to_owned())
}

/// What the servers have in common, so that the same peer can talk to either.
trait Server {
    fn open(&mut self, connection: ConnectionId, now: Duration);
    fn hear(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]);
    fn say(&mut self) -> Option<Transmit<ConnectionId>>;
}

impl Server for MainServerSession {
    fn open(&mut self, connection: ConnectionId, now: Duration) {
        self.connected(connection, now);
    }

    fn hear(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        self.handle_frame(connection, now, bytes);
    }

    fn say(&mut self) -> Option<Transmit<ConnectionId>> {
        self.poll_transmit()
    }
}

impl Server for FederatedServerSession {
    fn open(&mut self, connection: ConnectionId, now: Duration) {
        self.connected(connection, now);
    }

    fn hear(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        self.handle_frame(connection, now, bytes);
    }

    fn say(&mut self) -> Option<Transmit<ConnectionId>> {
        self.poll_transmit()
    }
}

/// A peer that speaks frame by frame and says whatever the test likes.
struct Peer {
    connection: ConnectionId,
    sent: u32,
    received: u32,
}

/// What a server said to one connection: messages, and whether it closed the connection after them.
#[derive(Debug, PartialEq)]
struct Said {
    answers: Vec<Answer>,
    messages: Vec<Message>,
    closed: bool,
}

fn listen(server: &mut impl Server, connection: ConnectionId) -> Said {
    let mut said = Said {
        answers: Vec::new(),
        messages: Vec::new(),
        closed: false,
    };
    while let Some(transmit) = server.say() {
        match transmit {
            Transmit::Frame { to, bytes } if to == connection => {
                assert!(!said.closed, "nothing is sent after the close");
                if codec::is_greeting(&bytes) {
                    said.answers.push(decode_answer(PROTOCOL_VERSION, &bytes).unwrap());
                } else if let Frame::Message { kind, body, .. } = decode_frame(&bytes).unwrap() {
                    said.messages.push(decode_message(kind, body).unwrap());
                }
            }
            Transmit::Close { to } if to == connection => said.closed = true,
            _ => {}
        }
    }
    said
}

fn greet(server: &mut impl Server, number: u64, now: Duration, hello: &Hello) -> Said {
    let connection = ConnectionId(number);
    server.open(connection, now);
    server.hear(connection, now, &encode_hello(hello));
    listen(server, connection)
}

fn refusal(said: &Said) -> Option<RefusalReason> {
    match said.answers.as_slice() {
        [Answer::Refused(refused)] if said.closed => Some(refused.reason),
        _ => None,
    }
}

fn welcome(said: &Said) -> Welcome {
    match said.answers.as_slice() {
        [Answer::Welcome(welcome)] if !said.closed => welcome.clone(),
        other => panic!("expected a welcome, got {other:?}, closed: {}", said.closed),
    }
}

impl Peer {
    fn join(server: &mut impl Server, number: u64, hello: &Hello) -> (Peer, Welcome) {
        let said = greet(server, number, Duration::ZERO, hello);
        let welcome = welcome(&said);
        let received = said.messages.len() as u32;
        (
            Peer {
                connection: ConnectionId(number),
                sent: 0,
                received,
            },
            welcome,
        )
    }

    fn send(&mut self, server: &mut impl Server, message: &Message) -> Said {
        let (kind, body) = encode_message(message);
        self.send_body(server, kind, &body)
    }

    fn send_body(&mut self, server: &mut impl Server, kind: u8, body: &[u8]) -> Said {
        let frame = Frame::Message {
            number: self.sent,
            acknowledged: self.received,
            kind,
            body,
        };
        self.sent += 1;
        server.hear(self.connection, Duration::ZERO, &encode_frame(frame));
        let said = listen(server, self.connection);
        self.received += said.messages.len() as u32;
        said
    }

    fn ping(&self, server: &mut impl Server, now: Duration) {
        let frame = Frame::Ping {
            nonce: 0,
            acknowledged: self.received,
        };
        server.hear(self.connection, now, &encode_frame(frame));
        listen(server, self.connection);
    }
}

fn stop_reason(said: &Said) -> Option<StopReason> {
    match said.messages.last() {
        Some(Message::Stop(stop)) if said.closed => Some(stop.reason),
        _ => None,
    }
}

fn events(main: &mut MainServerSession) -> Vec<MainEvent> {
    std::iter::from_fn(|| main.poll_event()).collect()
}

const KEY: StepKey = StepKey {
    round: RoundKey { round: 0, attempt: 0 },
    step: 0,
};

fn good_activations() -> Activations {
    Activations {
        key: KEY,
        split: 1,
        examples: 2,
        forward: Duration::ZERO,
        targets: vec![1, 2, 9, IGNORED_TARGET],
        tensor: zeros(2, 2, 2),
    }
}

fn tensor(batch: u32, seq: u32, width: u32, bytes: Vec<u8>) -> WireTensor {
    let layout = WireLayout {
        form: WireForm::F32,
        batch,
        seq,
        width,
    };
    WireTensor::new(layout, bytes).unwrap()
}

fn zeros(batch: u32, seq: u32, width: u32) -> WireTensor {
    tensor(batch, seq, width, vec![0; 4 * (batch * seq * width) as usize])
}

/// Zeros of the same layout, but in halves.
fn halves(batch: u32, seq: u32, width: u32) -> WireTensor {
    let layout = WireLayout {
        form: WireForm::F16,
        batch,
        seq,
        width,
    };
    WireTensor::new(layout, vec![0; layout.bytes().unwrap()]).unwrap()
}

/// A message with a tensor of f32 that no [`WireTensor`] can be: one of this layout and so many bytes. The layout stands at `at`, and
/// the tensor's bytes, of which the message has so many, at the end.
fn misfit(message: &Message, (at, len): (usize, usize), layout: [u32; 3], bytes: usize) -> (u8, Vec<u8>) {
    let (kind, mut body) = encode_message(message);
    for (place, size) in body[at..].chunks_exact_mut(4).zip(layout) {
        place.copy_from_slice(&size.to_le_bytes());
    }
    body.truncate(body.len() - len - 4);
    body.extend((bytes as u32).to_le_bytes());
    body.resize(body.len() + bytes, 0);
    (kind, body)
}

// 1. The handshake.

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

// 3. Authorisation.

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

// 4. Liveness.

#[test]
fn a_silent_client_is_gone_after_three_missed_pings_and_any_frame_keeps_one() {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let (quiet, _) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    let (alive, _) = Peer::join(&mut main, 2, &hello(Service::Main, secret()));
    let mut gone_at = None;
    for now in (0..40).map(seconds) {
        main.handle_timeout(now);
        if now.as_secs() % 14 == 13 {
            alive.ping(&mut main, now);
        }
        for event in events(&mut main) {
            if let MainEvent::ClientLeft { client, reason, .. } = event {
                assert_eq!((client, reason), (ClientId(1), DepartureReason::Silent));
                gone_at = Some(now);
            }
        }
    }
    assert_eq!(gone_at, Some(silence_limit(PING_INTERVAL) - PING_INTERVAL));
    assert_eq!(main.status().clients.len(), 1);
    assert_eq!(quiet.received, 1);
}

// 6. Misbehaviour ends one session, not the run.

/// A run with two raw clients, both ready, waiting for the first step's activations.
fn gathering() -> (MainServerSession, [Peer; 2]) {
    let mut main = MainServerSession::new(main_config(2), Duration::ZERO).unwrap();
    let peers = [1, 2].map(|number| {
        let (mut peer, _) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        peer.send(&mut main, &READY);
        peer
    });
    events(&mut main);
    (main, peers)
}

#[test]
fn activations_that_cannot_be_used_end_their_senders_session_and_the_step_goes_on() {
    let good = good_activations;
    let later = StepKey { step: 1, ..KEY };
    let other = StepKey {
        round: RoundKey { round: 0, attempt: 1 },
        step: 0,
    };
    let nan = tensor(2, 2, 2, f32::NAN.to_le_bytes().repeat(8));
    let bad = [
        ("another step", Activations { key: later, ..good() }),
        ("another attempt", Activations { key: other, ..good() }),
        (
            "no batch",
            Activations {
                targets: vec![],
                tensor: zeros(0, 2, 2),
                ..good()
            },
        ),
        (
            "too many rows",
            Activations {
                targets: vec![1; 6],
                tensor: zeros(3, 2, 2),
                ..good()
            },
        ),
        (
            "too long",
            Activations {
                targets: vec![1; 8],
                tensor: zeros(2, 4, 2),
                ..good()
            },
        ),
        (
            "another width",
            Activations {
                tensor: zeros(2, 2, 3),
                ..good()
            },
        ),
        (
            "another form",
            Activations {
                tensor: halves(2, 2, 2),
                ..good()
            },
        ),
        (
            "a missing target",
            Activations {
                targets: vec![1, 2, 3],
                ..good()
            },
        ),
        (
            "a target past the vocabulary",
            Activations {
                targets: vec![1, 2, 10, 3],
                ..good()
            },
        ),
        (
            "a negative target",
            Activations {
                targets: vec![1, -1, 2, 3],
                ..good()
            },
        ),
        ("another cut", Activations { split: 2, ..good() }),
        ("no examples", Activations { examples: 0, ..good() }),
        ("more examples than rows", Activations { examples: 3, ..good() }),
        ("a value that is not finite", Activations { tensor: nan, ..good() }),
    ];
    let bad = bad.map(|(what, activations)| (what, encode_message(&Message::Activations(activations))));
    let misfits = [
        ("a huge shape", [u32::MAX; 3], 32),
        ("a short payload", [2, 2, 2], 31),
        ("a long payload", [2, 2, 2], 36),
    ];
    let misfits = misfits.map(|(what, layout, bytes)| {
        // Behind the key and the cut.
        let good = Message::Activations(good());
        (what, misfit(&good, (16, 32), layout, bytes))
    });
    for (what, (kind, body)) in bad.into_iter().chain(misfits) {
        let (mut main, [mut honest, mut liar]) = gathering();
        let said = liar.send_body(&mut main, kind, &body);
        assert_eq!(stop_reason(&said), Some(StopReason::Unexpected), "{what}");
        let left = events(&mut main);
        assert!(
            matches!(
                left.as_slice(),
                [MainEvent::ClientLeft {
                    client: ClientId(2),
                    reason: DepartureReason::Misbehaved(_),
                    ..
                }]
            ),
            "{what}: {left:?}"
        );
        honest.send(&mut main, &Message::Activations(good()));
        let ready = events(&mut main);
        let [
            MainEvent::StepReady {
                key: KEY,
                contributions,
            },
        ] = ready.as_slice()
        else {
            panic!("{what}: {ready:?}");
        };
        assert_eq!(contributions.len(), 1);
        assert_eq!(
            (contributions[0].client, contributions[0].weight),
            (ClientId(1), 1.0),
            "{what}"
        );
    }
}

#[test]
fn a_message_out_of_place_ends_its_senders_session_and_is_named() {
    let average = Average {
        round: KEY.round,
        digest: Digest([0; 32]),
        values: Vec::new(),
    };
    for message in [
        READY,
        Message::Average(average),
        Message::StepStart(StepStart { key: KEY, members: 1 }),
        Message::Control(Control::CloseRun),
    ] {
        let (mut main, [_, mut liar]) = gathering();
        let said = liar.send(&mut main, &message);
        let Some(Message::Stop(stop)) = said.messages.last() else {
            panic!("{message:?}: {said:?}")
        };
        assert_eq!(stop.reason, StopReason::Unexpected);
        assert!(stop.detail.contains("expected Activations"), "{}", stop.detail);
        assert!(
            stop.detail.contains(&format!("got {}", message.name())),
            "{}",
            stop.detail
        );
    }
    let (mut main, [mut liar, _]) = gathering();
    liar.send(&mut main, &Message::Activations(good_activations()));
    let said = liar.send(&mut main, &Message::Activations(good_activations()));
    assert_eq!(
        stop_reason(&said),
        Some(StopReason::Unexpected),
        "one contribution to a step"
    );
}

#[test]
fn a_frame_larger_than_a_step_is_refused_before_it_is_parsed() {
    let (mut main, [_, liar]) = gathering();
    let limit = main.max_frame_bytes();
    main.handle_frame(liar.connection, Duration::ZERO, &vec![20; limit + 1]);
    let said = listen(&mut main, liar.connection);
    let Some(Message::Stop(stop)) = said.messages.last() else {
        panic!("{said:?}")
    };
    assert!(stop.detail.contains("larger than"), "{}", stop.detail);
    assert_eq!(main.status().clients.len(), 1);
}

#[test]
fn shares_are_of_tokens_and_add_up_to_one() {
    let (mut main, mut peers) = gathering();
    let targets = [
        vec![1, 2, 3, IGNORED_TARGET],
        vec![IGNORED_TARGET, 1, IGNORED_TARGET, IGNORED_TARGET],
    ];
    for (peer, targets) in peers.iter_mut().zip(targets) {
        let activations = Activations {
            targets,
            ..good_activations()
        };
        peer.send(&mut main, &Message::Activations(activations));
    }
    let ready = events(&mut main);
    let [MainEvent::StepReady { contributions, .. }] = ready.as_slice() else {
        panic!("{ready:?}")
    };
    let shares: Vec<(u64, f64)> = contributions
        .iter()
        .map(|contribution| (contribution.tokens, contribution.weight))
        .collect();
    assert_eq!(shares, [(3, 0.75), (1, 0.25)]);
}

fn output(client: u64, loss: f32, value: f32) -> GradientOutput {
    GradientOutput {
        client: ClientId(client),
        loss,
        gradient: tensor(2, 2, 2, value.to_le_bytes().repeat(8)),
    }
}

#[test]
fn who_leaves_while_the_server_computes_gets_no_gradient_and_has_no_part_in_the_next_step() {
    let (mut main, mut peers) = gathering();
    for peer in &mut peers {
        peer.send(&mut main, &Message::Activations(good_activations()));
    }
    main.disconnected(peers[1].connection, Duration::ZERO);
    events(&mut main);
    main.step_result(Duration::ZERO, KEY, vec![output(1, 2.0, 0.5), output(2, 4.0, 0.5)])
        .unwrap();
    let said = listen(&mut main, peers[0].connection);
    let [Message::Gradient(gradient), Message::StepStart(start)] = said.messages.as_slice() else {
        panic!("{said:?}");
    };
    assert_eq!((gradient.loss, gradient.mean_loss, gradient.tokens), (2.0, 2.0, 3));
    assert_eq!(
        gradient.activations,
        Digest::of(&[0; 32]),
        "the gradient names its activations"
    );
    assert_eq!((start.key.step, start.members), (1, 1));
    let mut again = Activations {
        key: start.key,
        ..good_activations()
    };
    again.examples = 1;
    again.targets.truncate(2);
    again.tensor = zeros(1, 2, 2);
    peers[0].received += 2;
    let done = StepDone {
        key: KEY,
        backward: seconds(9),
    };
    peers[0].send(&mut main, &Message::StepDone(done));
    peers[0].send(&mut main, &Message::Activations(again));
    let said = events(&mut main);
    let [
        MainEvent::StepMeasured { key: KEY, clients },
        MainEvent::StepReady { contributions, .. },
    ] = said.as_slice()
    else {
        panic!("{said:?}");
    };
    assert_eq!((clients.len(), contributions.len()), (1, 1));
    assert_eq!(
        clients[0].phases.backward,
        Duration::ZERO,
        "no part takes longer than the whole"
    );
}

#[test]
fn a_member_whose_loss_or_gradient_is_not_finite_is_dropped_and_the_rest_go_on() {
    let nothing = || vec![output(1, 2.0, 0.5)];
    let bad = [
        nothing(),
        vec![output(1, 2.0, 0.5), output(2, f32::NAN, 0.5)],
        vec![output(1, 2.0, 0.5), output(2, 2.0, f32::INFINITY)],
    ];
    for outputs in bad {
        let (mut main, mut peers) = gathering();
        for peer in &mut peers {
            peer.send(&mut main, &Message::Activations(good_activations()));
        }
        events(&mut main);
        main.step_result(Duration::ZERO, KEY, outputs).unwrap();
        let left = events(&mut main);
        assert!(
            matches!(
                left.as_slice(),
                [MainEvent::ClientLeft {
                    client: ClientId(2),
                    reason: DepartureReason::Unusable,
                    ..
                }]
            ),
            "{left:?}"
        );
        let controls: Vec<Control> = std::iter::from_fn(|| main.poll_control()).collect();
        assert!(controls.contains(&Control::Departed {
            round: KEY.round,
            client: ClientId(2)
        }));
        assert_eq!(main.status().phase, RunPhase::Gathering);
    }
    let (mut main, mut peers) = gathering();
    for peer in &mut peers {
        peer.send(&mut main, &Message::Activations(good_activations()));
    }
    let short = GradientOutput {
        client: ClientId(1),
        loss: 1.0,
        gradient: zeros(1, 1, 2),
    };
    let error = main.step_result(Duration::ZERO, KEY, vec![short]).unwrap_err();
    assert_eq!(
        error,
        MainError::GradientLayout {
            client: ClientId(1),
            given: zeros(1, 1, 2).layout(),
            expected: zeros(2, 2, 2).layout(),
        }
    );
}

#[test]
fn a_configuration_that_cannot_work_is_refused() {
    let with = |change: &dyn Fn(&mut MainConfig)| {
        let mut config = main_config(1);
        change(&mut config);
        MainServerSession::new(config, Duration::ZERO).err()
    };
    assert_eq!(with(&|_| {}), None);
    let zero = with(&|config| config.placement.assignment.config.batch = 0);
    assert!(matches!(zero, Some(MainError::Zero { value: 0, .. })), "{zero:?}");
    let large = with(&|config| config.placement.assignment.config.seq = u32::MAX);
    assert!(matches!(large, Some(MainError::StepTooLarge { .. })), "{large:?}");
    let length = with(&|config| config.placement.adapter.push(0.0));
    assert_eq!(length, Some(MainError::AdapterLength { assigned: 4, given: 5 }));
    assert_eq!(
        with(&|config| config.placement.adapter[0] = f32::NAN),
        Some(MainError::AdapterNotFinite)
    );
}

/// A run of two clients that plans, with its first clients ready.
fn planning() -> (MainServerSession, [Peer; 2]) {
    let config = MainConfig {
        plans: true,
        largest_update: 100,
        ..main_config(2)
    };
    let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
    let peers = [1, 2].map(|number| {
        let (mut peer, _) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        peer.send(&mut main, &READY);
        peer
    });
    let wanted = MainEvent::PlanWanted {
        occasion: Occasion::Start,
    };
    assert_eq!(events(&mut main).last(), Some(&wanted));
    (main, peers)
}

/// Cut after two blocks.
fn placement() -> Placement {
    Placement {
        assignment: reassignment(),
        adapter: vec![0.25; 8],
        moments: None,
        cuts: BTreeMap::new(),
    }
}

#[test]
fn a_placement_at_the_start_is_loaded_by_everybody_before_the_first_round() {
    let (mut main, mut peers) = planning();
    main.place(Duration::ZERO, placement()).unwrap();
    main.planned(Duration::ZERO, None).unwrap();
    assert_eq!(main.config().split, 2);
    let loaded = Message::Ready(Ready {
        assignment: 1,
        speed: None,
    });
    for peer in &mut peers {
        let said = listen(&mut main, peer.connection);
        peer.received += said.messages.len() as u32;
    }
    let [mut first, second] = peers;
    // Word of the first assignment, on its way when the second went out, is no offence.
    assert!(!first.send(&mut main, &READY).closed);
    first.send(&mut main, &loaded);
    assert_eq!(main.status().phase, RunPhase::Waiting);
    // Who is gone is not waited for, but two clients are needed.
    main.disconnected(second.connection, Duration::ZERO);
    assert_eq!(main.status().phase, RunPhase::Waiting);
    let (mut late, _) = Peer::join(&mut main, 3, &hello(Service::Main, secret()));
    assert!(second.sent == 1 && !late.send(&mut main, &loaded).closed);
    let known = events(&mut main);
    let wanted = MainEvent::PlanWanted {
        occasion: Occasion::Membership,
    };
    assert_eq!(
        known.last(),
        Some(&wanted),
        "the plan does not know the third client: {known:?}"
    );
    let rates = LinkRates::new(1e6, 1e5).unwrap();
    let plan = RoundPlan {
        split: None,
        rates: [(ClientId(3), rates)].into(),
    };
    main.planned(Duration::ZERO, Some(plan)).unwrap();
    let mut starts = Vec::new();
    while let Some(transmit) = main.poll_transmit() {
        if let Transmit::Frame { to, bytes } = transmit
            && let Ok(Frame::Message { kind, body, .. }) = decode_frame(&bytes)
            && let Ok(Message::RoundStart(start)) = decode_message(kind, body)
        {
            starts.push((to.0, start.rates, start.adapter));
        }
    }
    let adapter = Some(vec![0.25; 8]);
    assert_eq!(starts, [(1, None, adapter.clone()), (3, Some(rates), adapter)]);
}

#[test]
fn who_never_loads_what_it_is_reassigned_is_waited_for_only_so_long() {
    let config = MainConfig {
        plans: true,
        largest_update: 100,
        ..main_config(1)
    };
    let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
    let [mut quick, stuck] = [1, 2].map(|number| {
        let (mut peer, _) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        peer.send(&mut main, &READY);
        peer
    });
    main.place(Duration::ZERO, placement()).unwrap();
    main.planned(Duration::ZERO, None).unwrap();
    let loaded = Message::Ready(Ready {
        assignment: 1,
        speed: None,
    });
    quick.send(&mut main, &loaded);
    let started = |main: &mut MainServerSession| {
        let mut members = events(main).into_iter().filter_map(|event| match event {
            MainEvent::RoundStarted { members, .. } => Some(members),
            _ => None,
        });
        members.next()
    };
    for now in (1..60).map(seconds) {
        main.handle_timeout(now);
        for peer in [&quick, &stuck] {
            peer.ping(&mut main, now);
        }
        assert_eq!(started(&mut main), None, "at {now:?}");
    }
    main.handle_timeout(seconds(60));
    assert_eq!(started(&mut main), Some(vec![ClientId(1)]));
}

#[test]
fn a_plan_or_placement_that_does_not_fit_is_the_drivers_error() {
    let split = |split| {
        Some(RoundPlan {
            split: Some(split),
            ..RoundPlan::default()
        })
    };
    let (mut main, _) = planning();
    for wrong in [0, 2] {
        let error = main.planned(Duration::ZERO, split(wrong)).unwrap_err();
        assert_eq!(
            error,
            MainError::Split {
                found: wrong,
                expected: 1
            },
            "nobody has trained yet: that is for `place`"
        );
    }
    let with = |change: &dyn Fn(&mut Placement)| {
        let mut placement = placement();
        change(&mut placement);
        planning().0.place(Duration::ZERO, placement).err()
    };
    assert_eq!(with(&|_| {}), None);
    let length = with(&|placement| placement.adapter.push(0.0));
    assert_eq!(length, Some(MainError::AdapterLength { assigned: 8, given: 9 }));
    let blocks = with(&|placement| placement.assignment.config.split = 3);
    assert_eq!(blocks, Some(MainError::AdapterBlocks { len: 8, split: 3 }));
    assert_eq!(
        with(&|placement| placement.assignment.config.batch = 9),
        Some(MainError::Fixed)
    );
    assert_eq!(
        with(&|placement| placement.assignment.run = RunId([7; 16])),
        Some(MainError::Fixed)
    );
    assert_eq!(
        with(&|placement| placement.adapter[0] = f32::NAN),
        Some(MainError::AdapterNotFinite)
    );
    let moments = Moments {
        steps: 1,
        first: vec![0.0; 3],
        second: vec![0.0; 3],
    };
    assert_eq!(
        with(&|placement| placement.moments = Some(moments.clone())),
        Some(MainError::Moments)
    );
    let long = with(&|placement| {
        placement.adapter = vec![0.0; 202];
        placement.assignment.adapter_len = 202;
    });
    assert_eq!(long, Some(MainError::UpdateTooLong { len: 202, largest: 100 }));
    for cut in [0, 3] {
        let wrong = with(&|placement| placement.cuts = [(ClientId(1), cut)].into());
        let (client, largest) = (ClientId(1), 2);
        assert_eq!(wrong, Some(MainError::Cut { client, cut, largest }));
    }
    main.planned(Duration::ZERO, None).unwrap();
    assert_eq!(main.status().phase, RunPhase::Gathering);
    assert_eq!(
        main.place(Duration::ZERO, placement()),
        Err(MainError::Fixed),
        "training has begun"
    );
}

#[test]
fn clients_with_cuts_of_their_own_get_the_beginning_of_the_assignment_and_keep_it() {
    let (mut main, mut peers) = planning();
    let blob = |name: &str| Blob {
        name: name.to_owned(),
        sha256: Digest([0; 32]),
        bytes: 1,
    };
    let mut mixed = Placement {
        cuts: [(ClientId(1), 1), (ClientId(2), 2)].into(),
        ..placement()
    };
    mixed.assignment.weights = ["embedding", "block.0", "block.1"].map(blob).to_vec();
    main.place(Duration::ZERO, mixed).unwrap();
    main.planned(Duration::ZERO, None).unwrap();
    let mut assigned = BTreeMap::new();
    while let Some(transmit) = main.poll_transmit() {
        if let Transmit::Frame { to, bytes } = transmit
            && let Ok(Frame::Message { kind, body, .. }) = decode_frame(&bytes)
            && let Ok(Message::Assignment(assignment)) = decode_message(kind, body)
        {
            peers[to.0 as usize - 1].received += 1;
            let parts = assignment.weights.len();
            assigned.insert(to.0, (assignment.config.split, assignment.adapter_len, parts));
        }
    }
    assert_eq!(assigned, [(1, (1, 4, 2)), (2, (2, 8, 3))].into());
    let loaded = Message::Ready(Ready {
        assignment: 1,
        speed: None,
    });
    let [mut first, mut second] = peers;
    first.send(&mut main, &loaded);
    second.send(&mut main, &loaded);
    assert_eq!(main.status().phase, RunPhase::Gathering);
    let opened = std::iter::from_fn(|| main.poll_control()).last();
    let Some(Control::OpenRound {
        members, adapter_len, ..
    }) = opened
    else {
        panic!("{opened:?}")
    };
    let lengths: Vec<u64> = members.iter().map(|member| member.adapter_len).collect();
    assert_eq!((lengths.as_slice(), adapter_len), (&[4, 8][..], 8));
    let base = |length: usize| Digest::of_values(&[0.25; 8][..length]);
    assert_eq!([members[0].base, members[1].base], [base(4), base(8)]);
    // Activations of another cut than the client's own.
    let said = first.send(
        &mut main,
        &Message::Activations(Activations {
            split: 2,
            ..good_activations()
        }),
    );
    assert_eq!(stop_reason(&said), Some(StopReason::Unexpected));
}

// The federated service, frame by frame.

/// A member with the whole adapter.
fn member(client: u64) -> Member {
    Member {
        client: ClientId(client),
        base: Digest::of_values(&ADAPTER),
        adapter_len: 4,
    }
}

/// A federated service with an open round of two connected members, who have been asked for their adapters.
fn collecting() -> (FederatedServerSession, [Peer; 2]) {
    collecting_from(None)
}

/// The same with any number of members, who have been asked for moments too.
fn collecting_from<const MEMBERS: usize>(moments: Option<Leaving>) -> (FederatedServerSession, [Peer; MEMBERS]) {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let mut federated = FederatedServerSession::new(federated_config());
    while let Some(control) = main.poll_control() {
        federated.handle_control(Duration::ZERO, control);
    }
    let peers = std::array::from_fn(|index| {
        let number = index as u64 + 1;
        let (_, welcome) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        let credential = Credential::Ticket(welcome.federated_ticket.unwrap());
        Peer::join(&mut federated, number, &hello(Service::Federated, credential)).0
    });
    let round = KEY.round;
    let open = Control::OpenRound {
        round,
        members: (1..=MEMBERS as u64).map(member).collect(),
        adapter_len: 4,
        max_examples: 4,
    };
    federated.handle_control(Duration::ZERO, open);
    let copy = Vec::new();
    federated.handle_control(Duration::ZERO, Control::Collect { round, moments, copy });
    (federated, peers)
}

fn update(values: [f32; 4], examples: u64) -> AdapterUpdate {
    let base = Digest::of_values(&ADAPTER);
    AdapterUpdate {
        run: RunId([1; 16]),
        round: KEY.round,
        base,
        examples,
        values: values.to_vec(),
        moments: None,
    }
}

/// What the federated service says but for the arrivals of adapters.
fn replies(federated: &mut FederatedServerSession) -> Vec<ControlReply> {
    std::iter::from_fn(|| federated.poll_control())
        .filter(|reply| !matches!(reply, ControlReply::Received { .. }))
        .collect()
}

#[test]
fn the_average_goes_to_its_members_and_to_the_main_server() {
    let (mut federated, [mut first, mut second]) = collecting();
    let said = first.send(&mut federated, &Message::AdapterUpdate(update([1.0, 2.0, 3.0, 4.0], 1)));
    assert_eq!((said.messages.as_slice(), said.closed), ([].as_slice(), false));
    // (1 · 1 + 3 · 5) / 4 = 4, and so on.
    let said = second.send(
        &mut federated,
        &Message::AdapterUpdate(update([5.0, 2.0, -1.0, 0.0], 3)),
    );
    let values = vec![4.0, 2.0, 0.0, 1.0];
    let digest = Digest::of_values(&values);
    let average = Message::Average(Average {
        round: KEY.round,
        digest,
        values: values.clone(),
    });
    assert_eq!(said.messages.as_slice(), std::slice::from_ref(&average));
    let included = vec![
        Inclusion {
            client: ClientId(1),
            examples: 1,
        },
        Inclusion {
            client: ClientId(2),
            examples: 3,
        },
    ];
    let closed = RoundClosed {
        round: KEY.round,
        included,
        excluded: Vec::new(),
        average: Some(Mean {
            digest,
            values,
            moments: None,
        }),
    };
    assert_eq!(replies(&mut federated), [ControlReply::RoundClosed(closed)]);
    // A member that did not hear of it asks by sending again, and changes nothing.
    let said = first.send(&mut federated, &Message::AdapterUpdate(update([9.0; 4], 1)));
    assert_eq!(said.messages, [average]);
    assert_eq!(replies(&mut federated), []);
}

/// A federated service with an open round of three members, whose cuts are after one, two and three blocks of one value.
fn collecting_prefixes(control: ControlAccess) -> (FederatedServerSession, [Peer; 3]) {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let mut federated = FederatedServerSession::new(FederatedConfig {
        control,
        ..federated_config()
    });
    while let Some(control) = main.poll_control() {
        federated.handle_control(Duration::ZERO, control);
    }
    let peers = [1, 2, 3].map(|number| {
        let (_, welcome) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        let credential = Credential::Ticket(welcome.federated_ticket.unwrap());
        Peer::join(&mut federated, number, &hello(Service::Federated, credential)).0
    });
    federated.handle_control(Duration::ZERO, open_prefixes([1, 2, 3], 3));
    (federated, peers)
}

fn open_prefixes(lengths: [u64; 3], adapter_len: u64) -> Control {
    Control::OpenRound {
        round: KEY.round,
        members: (lengths.into_iter().zip(1..))
            .map(|(length, client)| Member {
                client: ClientId(client),
                base: Digest::of_values(&ADAPTER[..length as usize]),
                adapter_len: length,
            })
            .collect(),
        adapter_len,
        max_examples: 8,
    }
}

fn collect(copy: &[f32]) -> Control {
    Control::Collect {
        round: KEY.round,
        moments: None,
        copy: copy.to_vec(),
    }
}

fn prefix(values: &[f32], examples: u64) -> Message {
    Message::AdapterUpdate(AdapterUpdate {
        base: Digest::of_values(&ADAPTER[..values.len()]),
        values: values.to_vec(),
        ..update(ADAPTER, examples)
    })
}

#[test]
fn each_block_is_averaged_over_whoever_trained_it_and_each_member_gets_its_own() {
    let (mut federated, [mut first, mut second, mut third]) = collecting_prefixes(ControlAccess::Local);
    // What comes before the main server's copy is not lost, and closes nothing.
    let early = third.send(&mut federated, &prefix(&[4.0, 2.0, 1.0], 5));
    assert_eq!((early.messages.as_slice(), early.closed), ([].as_slice(), false));
    federated.handle_control(Duration::ZERO, collect(&[10.0, -3.0]));
    first.send(&mut federated, &prefix(&[0.0], 1));
    second.send(&mut federated, &prefix(&[8.0, 4.0], 2));
    // (1·0 + 2·8 + 5·4) / 8; (1·10 + 2·4 + 5·2) / 8; ((1 + 2)·(−3) + 5·1) / 8.
    let values = vec![4.5, 3.5, -0.5];
    let said = replies(&mut federated);
    let [ControlReply::RoundClosed(closed)] = said.as_slice() else {
        panic!("{said:?}")
    };
    let average = closed.average.as_ref().unwrap();
    assert_eq!((&average.values, average.digest), (&values, Digest::of_values(&values)));
    let mut got = BTreeMap::new();
    while let Some(transmit) = federated.poll_transmit() {
        if let Transmit::Frame { to, bytes } = transmit
            && let Ok(Frame::Message { kind, body, .. }) = decode_frame(&bytes)
            && let Ok(Message::Average(average)) = decode_message(kind, body)
        {
            assert_eq!(average.digest, Digest::of_values(&average.values));
            got.insert(to.0, average.values);
        }
    }
    for (number, own) in &got {
        assert_eq!(own, &values[..*number as usize]);
    }
    // Whoever did not hear of it gets its own part again.
    for (number, peer) in [(1, &mut first), (2, &mut second), (3, &mut third)] {
        let said = peer.send(&mut federated, &prefix(&ADAPTER[..number], 1));
        let [Message::Average(average)] = said.messages.as_slice() else {
            panic!("{said:?}")
        };
        assert_eq!(average.values, values[..number]);
    }
}

#[test]
fn who_departs_leaves_its_blocks_to_the_copy_or_the_copy_without_weight() {
    // Without the deepest, the copy is all there is of the last block.
    let (mut federated, [mut first, mut second, _]) = collecting_prefixes(ControlAccess::Local);
    federated.handle_control(Duration::ZERO, collect(&[10.0, -3.0]));
    first.send(&mut federated, &prefix(&[0.0], 1));
    second.send(&mut federated, &prefix(&[8.0, 4.0], 3));
    let departed = |client| Control::Departed {
        round: KEY.round,
        client: ClientId(client),
    };
    federated.handle_control(Duration::ZERO, departed(3));
    let average = |federated: &mut FederatedServerSession| match replies(federated).pop() {
        Some(ControlReply::RoundClosed(closed)) => closed.average.map(|mean| mean.values),
        other => panic!("{other:?}"),
    };
    assert_eq!(average(&mut federated), Some(vec![6.0, 5.5, -3.0]));
    // Without those that lack blocks, the copy has no say.
    let (mut federated, [_, _, mut third]) = collecting_prefixes(ControlAccess::Local);
    federated.handle_control(Duration::ZERO, collect(&[10.0, -3.0]));
    third.send(&mut federated, &prefix(&[4.0, 2.0, 1.0], 5));
    federated.handle_control(Duration::ZERO, departed(1));
    federated.handle_control(Duration::ZERO, departed(2));
    assert_eq!(average(&mut federated), Some(vec![4.0, 2.0, 1.0]));
}

#[test]
fn lengths_that_cannot_be_end_their_senders_session() {
    // Of a member: another prefix than its own, by the right base or not.
    for values in [&[][..], &[1.0], &[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0, 4.0]] {
        let (mut federated, [_, mut second, _]) = collecting_prefixes(ControlAccess::Local);
        federated.handle_control(Duration::ZERO, collect(&[10.0, -3.0]));
        let hostile = AdapterUpdate {
            base: Digest::of_values(&ADAPTER[..2]),
            values: values.to_vec(),
            ..update(ADAPTER, 1)
        };
        let said = second.send(&mut federated, &Message::AdapterUpdate(hostile));
        assert_eq!(stop_reason(&said), Some(StopReason::BadUpdate), "{values:?}");
        let excluded = replies(&mut federated);
        assert!(
            matches!(
                excluded.as_slice(),
                [ControlReply::Excluded {
                    exclusion: Exclusion {
                        reason: ExclusionReason::WrongLength,
                        ..
                    },
                    ..
                }]
            ),
            "{excluded:?}"
        );
    }
    // Of a main server elsewhere.
    let secret_of = || ControlAccess::Remote {
        secret: Some(SECRET.to_owned()),
    };
    let hostile: [&[Control]; 6] = [
        &[open_prefixes([1, 2, 4], 3)],
        &[open_prefixes([1, 2, 3], 3), collect(&[])],
        &[open_prefixes([1, 2, 3], 3), collect(&[1.0])],
        &[open_prefixes([1, 2, 3], 3), collect(&[1.0; 4])],
        &[open_prefixes([1, 2, 3], 3), collect(&[1.0, f32::NAN])],
        &[open_prefixes([1, 2, 3], u64::MAX), collect(&[1.0, 2.0])],
    ];
    for controls in hostile {
        let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
        let config = FederatedConfig {
            control: secret_of(),
            ..federated_config()
        };
        let mut federated = FederatedServerSession::new(config);
        let (mut link, _) = Peer::join(&mut federated, 9, &hello(Service::Control, secret()));
        let open = main.poll_control().unwrap();
        let mut said = link.send(&mut federated, &Message::Control(open));
        for control in controls {
            assert_eq!(stop_reason(&said), None);
            said = link.send(&mut federated, &Message::Control(control.clone()));
        }
        assert_eq!(stop_reason(&said), Some(StopReason::Unexpected), "{controls:?}");
    }
}

/// Moments of the last two values as after 6 steps.
const LEAVING: Leaving = Leaving { len: 2, steps: 6 };

fn moments(first: [f32; 2], second: [f32; 2]) -> Moments {
    Moments {
        steps: 6,
        first: first.to_vec(),
        second: second.to_vec(),
    }
}

#[test]
fn moments_are_averaged_by_the_weights_of_their_adapters() {
    let (mut federated, mut peers) = collecting_from::<3>(Some(LEAVING));
    let given = [
        ([1.0; 4], 1, moments([8.0, -4.0], [4.0, 0.0])),
        ([5.0; 4], 3, moments([0.0, 4.0], [0.0, 2.0])),
        ([2.0; 4], 4, moments([4.0, 2.0], [3.0, 0.5])),
    ];
    for (peer, (values, examples, moments)) in peers.iter_mut().zip(given) {
        let update = AdapterUpdate {
            moments: Some(moments),
            ..update(values, examples)
        };
        let said = peer.send(&mut federated, &Message::AdapterUpdate(update));
        assert!(!said.closed, "{said:?}");
    }
    let said = replies(&mut federated);
    let [ControlReply::RoundClosed(closed)] = said.as_slice() else {
        panic!("{said:?}")
    };
    // The weights are 1/8, 3/8 and 4/8.
    let mean = closed.average.as_ref().unwrap();
    assert_eq!(mean.values, [3.0; 4]); // 1/8 + 15/8 + 8/8
    // 8/8 + 0 + 16/8, -4/8 + 12/8 + 8/8; 4/8 + 0 + 12/8, 0 + 6/8 + 2/8.
    assert_eq!(mean.moments, Some(moments([3.0, 2.0], [2.0, 1.0])));
}

#[test]
fn moments_that_cannot_be_used_are_left_out_and_named() {
    let good = moments([1.0, 2.0], [1.0, 2.0]);
    for (bad, reason) in [
        (None, ExclusionReason::WrongLength),
        (
            Some(Moments {
                steps: 5,
                ..good.clone()
            }),
            ExclusionReason::WrongLength,
        ),
        (
            Some(Moments {
                first: vec![1.0],
                ..good.clone()
            }),
            ExclusionReason::WrongLength,
        ),
        (
            Some(Moments {
                second: vec![1.0; 3],
                ..good.clone()
            }),
            ExclusionReason::WrongLength,
        ),
        (Some(moments([f32::NAN, 0.0], [0.0; 2])), ExclusionReason::NotFinite),
        (
            Some(moments([0.0; 2], [f32::INFINITY, 0.0])),
            ExclusionReason::NotFinite,
        ),
        (Some(moments([0.0; 2], [-1.0, 0.0])), ExclusionReason::NotFinite),
    ] {
        let (mut federated, [_, mut liar]) = collecting_from::<2>(Some(LEAVING));
        let update = AdapterUpdate {
            moments: bad,
            ..update([1.0; 4], 1)
        };
        let said = liar.send(&mut federated, &Message::AdapterUpdate(update));
        assert_eq!(stop_reason(&said), Some(StopReason::BadUpdate), "{reason:?}");
        let said = replies(&mut federated);
        assert!(
            matches!(said.as_slice(), [ControlReply::Excluded { exclusion, .. }] if exclusion.reason == reason),
            "{said:?}"
        );
    }
    let (mut federated, [_, mut liar]) = collecting();
    let unasked = AdapterUpdate {
        moments: Some(good),
        ..update([1.0; 4], 1)
    };
    let said = liar.send(&mut federated, &Message::AdapterUpdate(unasked));
    assert_eq!(
        stop_reason(&said),
        Some(StopReason::BadUpdate),
        "nobody asked for moments"
    );
}

#[test]
fn an_adapter_that_cannot_be_used_is_left_out_and_named() {
    let mut short = update([1.0; 4], 1);
    short.values.pop();
    let mut long = update([1.0; 4], 1);
    long.values.push(0.0);
    let wrong_base = AdapterUpdate {
        base: Digest([7; 32]),
        ..update([1.0; 4], 1)
    };
    let other_run = AdapterUpdate {
        run: RunId([7; 16]),
        ..update([1.0; 4], 1)
    };
    for (bad, reason) in [
        (short, ExclusionReason::WrongLength),
        (long, ExclusionReason::WrongLength),
        (update([1.0, f32::NAN, 0.0, 0.0], 1), ExclusionReason::NotFinite),
        (
            update([1.0, 0.0, 0.0, f32::NEG_INFINITY], 1),
            ExclusionReason::NotFinite,
        ),
        (wrong_base, ExclusionReason::WrongBase),
        (other_run, ExclusionReason::Misbehaved),
        (update([1.0; 4], 0), ExclusionReason::Examples),
        (update([1.0; 4], 5), ExclusionReason::Examples),
        (update([1.0; 4], u64::MAX), ExclusionReason::Examples),
    ] {
        let (mut federated, [mut honest, mut liar]) = collecting();
        let said = liar.send(&mut federated, &Message::AdapterUpdate(bad));
        assert_eq!(stop_reason(&said), Some(StopReason::BadUpdate), "{reason:?}");
        let exclusion = Exclusion {
            client: ClientId(2),
            reason,
        };
        let word = ControlReply::Excluded {
            round: KEY.round,
            exclusion: exclusion.clone(),
        };
        assert_eq!(
            replies(&mut federated),
            [word],
            "the main server need not wait for the round to know"
        );
        honest.send(&mut federated, &Message::AdapterUpdate(update(ADAPTER, 2)));
        let closed = replies(&mut federated);
        let [ControlReply::RoundClosed(closed)] = closed.as_slice() else {
            panic!("{closed:?}")
        };
        assert_eq!(closed.excluded, [exclusion]);
        assert_eq!(
            closed.average.as_ref().map(|mean| mean.values.as_slice()),
            Some(&ADAPTER[..])
        );
    }
}

#[test]
fn who_departs_after_sending_its_adapter_is_not_in_the_average() {
    let (mut federated, [mut first, mut second]) = collecting();
    first.send(&mut federated, &Message::AdapterUpdate(update([100.0; 4], 4)));
    federated.handle_control(
        Duration::ZERO,
        Control::Departed {
            round: KEY.round,
            client: ClientId(1),
        },
    );
    second.send(&mut federated, &Message::AdapterUpdate(update(ADAPTER, 1)));
    let closed = replies(&mut federated);
    let [ControlReply::RoundClosed(closed)] = closed.as_slice() else {
        panic!("{closed:?}")
    };
    assert_eq!(
        closed.included,
        [Inclusion {
            client: ClientId(2),
            examples: 1
        }]
    );
    assert_eq!(
        closed.average.as_ref().map(|mean| mean.values.as_slice()),
        Some(&ADAPTER[..])
    );
}

#[test]
fn a_member_without_a_connection_is_left_out_after_the_silence_limit() {
    let (mut federated, [mut first, second]) = collecting();
    first.send(&mut federated, &Message::AdapterUpdate(update(ADAPTER, 1)));
    federated.disconnected(second.connection, seconds(3));
    let deadline = seconds(3) + silence_limit(PING_INTERVAL);
    for now in (3..deadline.as_secs()).map(seconds) {
        federated.handle_timeout(now);
        first.ping(&mut federated, now);
        assert_eq!(replies(&mut federated), []);
    }
    federated.handle_timeout(deadline);
    let said = replies(&mut federated);
    let [
        ControlReply::Excluded { exclusion, .. },
        ControlReply::RoundClosed(closed),
    ] = said.as_slice()
    else {
        panic!("{said:?}");
    };
    assert_eq!(
        *exclusion,
        Exclusion {
            client: ClientId(2),
            reason: ExclusionReason::Absent
        }
    );
    assert_eq!(closed.included.len(), 1);
}

#[test]
fn a_round_that_nobody_is_left_in_closes_without_an_average() {
    let (mut federated, _) = collecting();
    for client in [ClientId(1), ClientId(2)] {
        federated.handle_control(
            Duration::ZERO,
            Control::Departed {
                round: KEY.round,
                client,
            },
        );
    }
    let said = replies(&mut federated);
    let [ControlReply::RoundClosed(closed)] = said.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!(
        (closed.average.as_ref(), closed.included.len(), closed.excluded.len()),
        (None, 0, 2)
    );
}

#[test]
fn an_adapter_for_a_round_that_is_over_is_declined_with_the_round_that_is_open() {
    let (mut federated, [mut first, _]) = collecting();
    let round = RoundKey { round: 0, attempt: 1 };
    let open = Control::OpenRound {
        round,
        members: vec![member(1)],
        adapter_len: 4,
        max_examples: 4,
    };
    federated.handle_control(Duration::ZERO, open);
    let said = first.send(&mut federated, &Message::AdapterUpdate(update(ADAPTER, 1)));
    let [Message::UpdateDeclined(declined)] = said.messages.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!((declined.round, declined.open), (KEY.round, Some(round)));
    assert!(!said.closed, "being late is no offence");
}

#[test]
fn an_adapter_that_overtakes_the_opening_of_its_round_is_in_the_average() {
    let (mut federated, [mut first, second]) = collecting();
    let round = RoundKey { round: 0, attempt: 1 };
    let early = AdapterUpdate {
        round,
        ..update([1.0; 4], 1)
    };
    let said = first.send(&mut federated, &Message::AdapterUpdate(early));
    assert_eq!((said.messages.as_slice(), said.closed), ([].as_slice(), false));
    let open = |members| Control::OpenRound {
        round,
        members,
        adapter_len: 4,
        max_examples: 4,
    };
    federated.handle_control(Duration::ZERO, open(vec![member(1)]));
    assert_eq!(replies(&mut federated), [], "nobody has been asked for an adapter");
    let collect = Control::Collect {
        round,
        moments: None,
        copy: Vec::new(),
    };
    federated.handle_control(Duration::ZERO, collect);
    let said = replies(&mut federated);
    let [ControlReply::RoundClosed(closed)] = said.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!(
        closed.included,
        [Inclusion {
            client: ClientId(1),
            examples: 1
        }]
    );
    assert_eq!(second.sent, 0);
}

// 9. Pairing, against a server that does not keep to it.

/// A main server's side of one connection, in the test's hands.
struct Puppet {
    client: ClientSession,
    sent: u32,
}

impl Puppet {
    /// A client that has loaded its first assignment.
    fn ready() -> Puppet {
        let mut client = ClientSession::new(client_config(), Duration::ZERO);
        let mut puppet = {
            client.connected(Endpoint::Main, Duration::ZERO);
            Puppet { client, sent: 0 }
        };
        puppet.answer(Endpoint::Main);
        puppet.client.connected(Endpoint::Federated, Duration::ZERO);
        puppet.answer(Endpoint::Federated);
        puppet.send(&Message::Assignment(Box::new(assignment(RunId([1; 16])))));
        puppet.client.ready(Duration::ZERO, None);
        puppet
    }

    /// A client in the middle of step 0, which has sent its activations.
    fn awaiting_gradient() -> Puppet {
        let mut puppet = Puppet::ready();
        let base = Digest::of_values(&ADAPTER);
        let adapter = Some(ADAPTER.to_vec());
        puppet.send(&Message::RoundStart(RoundStart {
            round: KEY.round,
            base,
            members: 1,
            adapter,
            moments: None,
            rates: None,
        }));
        puppet.send(&Message::StepStart(StepStart { key: KEY, members: 1 }));
        let asked = puppet.events();
        assert!(asked.contains(&ClientEvent::ComputeForward { key: KEY }), "{asked:?}");
        let input = ActivationsInput {
            key: KEY,
            examples: 1,
            forward: Duration::ZERO,
            targets: vec![1, 2],
            tensor: tensor(1, 2, 2, vec![3; 16]),
        };
        puppet.client.activations(Duration::ZERO, input).unwrap();
        puppet
    }

    /// A client that has done both steps of round 0.
    fn awaiting_end() -> Puppet {
        let mut puppet = Puppet::awaiting_gradient();
        puppet.send(&Message::Gradient(good_gradient()));
        let next = StepKey { step: 1, ..KEY };
        puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
        puppet.send(&Message::StepStart(StepStart { key: next, members: 1 }));
        let input = ActivationsInput {
            key: next,
            examples: 1,
            forward: Duration::ZERO,
            targets: vec![1, 2],
            tensor: tensor(1, 2, 2, vec![3; 16]),
        };
        puppet.client.activations(Duration::ZERO, input).unwrap();
        puppet.send(&Message::Gradient(Gradient {
            key: next,
            ..good_gradient()
        }));
        puppet.client.step_done(Duration::ZERO, next, Duration::ZERO);
        puppet.events();
        puppet
    }

    fn answer(&mut self, endpoint: Endpoint) {
        let ticket = Ticket(vec![1]);
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            client: ClientId(1),
            run: RunId([1; 16]),
            ticket: ticket.clone(),
            federated_ticket: (endpoint == Endpoint::Main).then_some(ticket),
            federated_url: None,
            ping_interval: PING_INTERVAL,
            model: Digest::of(b"model"),
            tokenizer: Digest::of(b"tokenizer"),
        };
        let bytes = encode_answer(&Answer::Welcome(welcome));
        self.client.handle_frame(endpoint, Duration::ZERO, &bytes);
    }

    fn send(&mut self, message: &Message) {
        let (kind, body) = encode_message(message);
        self.send_body(kind, &body);
    }

    fn send_body(&mut self, kind: u8, body: &[u8]) {
        let frame = Frame::Message {
            number: self.sent,
            acknowledged: 0,
            kind,
            body,
        };
        self.sent += 1;
        self.client
            .handle_frame(Endpoint::Main, Duration::ZERO, &encode_frame(frame));
    }

    fn events(&mut self) -> Vec<ClientEvent> {
        std::iter::from_fn(|| self.client.poll_event()).collect()
    }
}

fn good_gradient() -> Gradient {
    Gradient {
        key: KEY,
        activations: Digest::of(&[3; 16]),
        loss: 1.0,
        tokens: 2,
        mean_loss: 1.0,
        tensor: zeros(1, 2, 2),
    }
}

#[test]
fn a_gradient_is_applied_only_to_the_activations_it_belongs_to() {
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&Message::Gradient(good_gradient()));
    assert_eq!(
        puppet.events(),
        [ClientEvent::ComputeBackward {
            key: KEY,
            gradient: good_gradient()
        }]
    );

    let good = good_gradient;
    let other = StepKey {
        round: RoundKey { round: 0, attempt: 1 },
        step: 0,
    };
    for bad in [
        Gradient {
            key: StepKey { step: 1, ..KEY },
            ..good()
        },
        Gradient { key: other, ..good() },
        Gradient {
            activations: Digest::of(&[4; 16]),
            ..good()
        },
        Gradient {
            tensor: zeros(2, 1, 2),
            ..good()
        },
        Gradient {
            tensor: zeros(1, 2, 1),
            ..good()
        },
        Gradient {
            tensor: halves(1, 2, 2),
            ..good()
        },
        Gradient {
            tensor: tensor(1, 2, 2, f32::NAN.to_le_bytes().repeat(4)),
            ..good()
        },
    ] {
        let mut puppet = Puppet::awaiting_gradient();
        puppet.send(&Message::Gradient(bad.clone()));
        let events = puppet.events();
        assert!(
            matches!(events.as_slice(), [ClientEvent::Failed(ClientFailure::Protocol { .. })]),
            "{bad:?}: {events:?}"
        );
    }
    for (layout, bytes) in [([1, 2, 2], 12), ([1, 2, 1], 16), ([u32::MAX; 3], 16)] {
        let mut puppet = Puppet::awaiting_gradient();
        // Behind the key.
        let (kind, body) = misfit(&Message::Gradient(good()), (12, 16), layout, bytes);
        puppet.send_body(kind, &body);
        let events = puppet.events();
        assert!(
            matches!(
                events.as_slice(),
                [ClientEvent::Failed(ClientFailure::Connection { .. })]
            ),
            "{layout:?}: {events:?}"
        );
    }
}

#[test]
fn a_second_gradient_for_the_same_step_is_never_applied() {
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&Message::Gradient(good_gradient()));
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    puppet.events();
    puppet.send(&Message::Gradient(good_gradient()));
    let events = puppet.events();
    assert!(
        matches!(events.as_slice(), [ClientEvent::Failed(ClientFailure::Protocol { .. })]),
        "{events:?}"
    );
}

#[test]
fn an_adapter_that_is_not_what_its_digest_says_is_not_installed() {
    let base = Digest::of_values(&ADAPTER);
    for (base, adapter) in [
        (base, Some(vec![1.0; 4])),
        (Digest::of_values(&[1.0; 3]), Some(vec![1.0; 3])),
        (Digest::of_values(&[f32::NAN; 4]), Some(vec![f32::NAN; 4])),
        (base, None),
    ] {
        let mut puppet = Puppet::ready();
        puppet.events();
        puppet.send(&Message::RoundStart(RoundStart {
            round: KEY.round,
            base,
            members: 1,
            adapter,
            moments: None,
            rates: None,
        }));
        let events = puppet.events();
        assert!(
            matches!(events.as_slice(), [ClientEvent::Failed(ClientFailure::Protocol { .. })]),
            "{events:?}"
        );
    }
}

/// What a client that fails says.
fn failure(puppet: &mut Puppet) -> String {
    match puppet.events().pop() {
        Some(ClientEvent::Failed(failure @ ClientFailure::Protocol { .. })) => failure.to_string(),
        other => panic!("expected a failure, got {other:?}"),
    }
}

/// The same run cut after two blocks.
fn reassignment() -> Assignment {
    let first = assignment(RunId([1; 16]));
    Assignment {
        number: 1,
        config: RunConfig {
            split: 2,
            ..first.config.clone()
        },
        adapter_len: 8,
        ..first
    }
}

#[test]
fn another_assignment_is_loaded_between_rounds_and_nowhere_else() {
    let reassign = |assignment: Assignment| Message::Assignment(Box::new(assignment));
    let mut puppet = Puppet::ready();
    puppet.events();
    puppet.send(&reassign(reassignment()));
    assert_eq!(puppet.events(), [ClientEvent::Assigned(Box::new(reassignment()))]);
    while puppet.client.poll_transmit().is_some() {}
    puppet.client.ready(Duration::ZERO, Speed::new(2.0, 3.0));
    let Some(Transmit::Frame { bytes, .. }) = puppet.client.poll_transmit() else {
        panic!("nothing said")
    };
    let Ok(Frame::Message { kind, body, .. }) = decode_frame(&bytes) else {
        panic!("no message")
    };
    let ready = Message::Ready(Ready {
        assignment: 1,
        speed: Speed::new(2.0, 3.0),
    });
    assert_eq!(decode_message(kind, body), Ok(ready));

    // Not twice, not out of order, not in the middle of a step, and of no impossible size.
    let again = Assignment {
        number: 1,
        config: assignment(RunId([1; 16])).config,
        ..reassignment()
    };
    puppet.send(&reassign(again));
    assert!(failure(&mut puppet).contains("got Assignment 1"));
    let mut puppet = Puppet::ready();
    puppet.send(&reassign(Assignment {
        number: 0,
        ..reassignment()
    }));
    assert!(failure(&mut puppet).contains("got Assignment 0"));
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&reassign(reassignment()));
    assert!(failure(&mut puppet).contains("expected Gradient"));
    let mut puppet = Puppet::ready();
    puppet.send(&reassign(Assignment {
        adapter_len: u64::MAX / 2,
        ..reassignment()
    }));
    assert!(failure(&mut puppet).contains("too large"));
}

#[test]
fn a_round_does_not_start_before_the_latest_assignment_is_loaded() {
    let mut puppet = Puppet::ready();
    puppet.send(&Message::Assignment(Box::new(reassignment())));
    puppet.events();
    puppet.send(&Message::RoundStart(round_start(vec![0.5; 8], None)));
    assert!(failure(&mut puppet).contains("got RoundStart"));
}

fn round_start(adapter: Vec<f32>, moments: Option<Moments>) -> RoundStart {
    RoundStart {
        round: KEY.round,
        base: Digest::of_values(&adapter),
        members: 1,
        adapter: Some(adapter),
        moments,
        rates: None,
    }
}

#[test]
fn moments_are_those_of_an_adapters_last_blocks_or_end_the_session() {
    let of = |len: usize, value: f32| Moments {
        steps: 3,
        first: vec![value; len],
        second: vec![value; len],
    };
    let two_blocks = || {
        let mut puppet = Puppet::ready();
        puppet.send(&Message::Assignment(Box::new(reassignment())));
        puppet.client.ready(Duration::ZERO, None);
        puppet.events();
        puppet
    };
    let mut puppet = two_blocks();
    puppet.send(&Message::RoundStart(round_start(vec![0.5; 8], Some(of(4, 1.0)))));
    let said = puppet.events();
    assert!(
        matches!(&said[0], ClientEvent::InstallAdapter { moments: Some(moments), .. } if *moments == of(4, 1.0)),
        "{said:?}"
    );
    let uneven = Moments {
        second: vec![1.0; 3],
        ..of(4, 1.0)
    };
    for bad in [
        of(3, 1.0),
        of(8, 1.0),
        of(12, 1.0),
        of(4, f32::NAN),
        of(4, -1.0),
        uneven,
    ] {
        let mut puppet = two_blocks();
        puppet.send(&Message::RoundStart(round_start(vec![0.5; 8], Some(bad))));
        assert!(failure(&mut puppet).contains("last blocks"));
    }
    let mut puppet = two_blocks();
    puppet.send(&Message::RoundStart(RoundStart {
        adapter: None,
        ..round_start(vec![0.5; 8], Some(of(4, 1.0)))
    }));
    assert!(failure(&mut puppet).contains("without the adapter"));
}

#[test]
fn an_adapter_is_asked_for_after_the_last_step_and_with_sense() {
    let end = |split, steps| {
        Message::RoundEnd(RoundEnd {
            round: KEY.round,
            split,
            steps,
        })
    };
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&end(1, 2));
    assert!(failure(&mut puppet).contains("got RoundEnd"));
    for (split, steps) in [(0, 2), (1, 0)] {
        let mut puppet = Puppet::awaiting_end();
        puppet.send(&end(split, steps));
        assert!(failure(&mut puppet).contains("RoundEnd"));
    }
    let mut puppet = Puppet::awaiting_end();
    puppet.send(&end(1, 2));
    let asked = ClientEvent::UploadAdapter {
        round: KEY.round,
        split: 1,
        steps: 2,
    };
    assert_eq!(puppet.events(), [asked]);
    let input = AdapterInput {
        round: KEY.round,
        examples: 1,
        values: ADAPTER.to_vec(),
        moments: Some(Moments {
            steps: 2,
            first: vec![0.0; 4],
            second: vec![0.0; 4],
        }),
    };
    assert_eq!(
        puppet.client.adapter(Duration::ZERO, input.clone()),
        Err(ClientError::Moments),
        "no block leaves"
    );
    let without = AdapterInput { moments: None, ..input };
    assert_eq!(
        puppet.client.adapter(Duration::ZERO, without),
        Ok(()),
        "the request stands"
    );
}

#[test]
fn answers_to_superseded_requests_are_dropped_and_wrong_shapes_are_the_drivers_error() {
    let mut puppet = Puppet::awaiting_gradient();
    let stale = ActivationsInput {
        key: KEY,
        examples: 1,
        forward: Duration::ZERO,
        targets: vec![1],
        tensor: zeros(1, 1, 2),
    };
    while puppet.client.poll_transmit().is_some() {}
    assert_eq!(puppet.client.activations(Duration::ZERO, stale.clone()), Ok(()));
    let unasked = AdapterInput {
        round: KEY.round,
        examples: 1,
        values: Vec::new(),
        moments: None,
    };
    assert_eq!(puppet.client.adapter(Duration::ZERO, unasked), Ok(()));
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    assert_eq!(puppet.client.poll_transmit(), None, "nothing is sent twice");

    puppet.send(&Message::Gradient(good_gradient()));
    let next = StepKey { step: 1, ..KEY };
    puppet.send(&Message::StepStart(StepStart { key: next, members: 1 }));
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    let fits = ActivationsInput { key: next, ..stale };
    let wide = ActivationsInput {
        tensor: zeros(3, 1, 2),
        ..fits.clone()
    };
    assert!(matches!(
        puppet.client.activations(Duration::ZERO, wide),
        Err(ClientError::Layout { .. })
    ));
    let short = ActivationsInput {
        targets: Vec::new(),
        ..fits.clone()
    };
    assert!(matches!(
        puppet.client.activations(Duration::ZERO, short),
        Err(ClientError::Targets { .. })
    ));
    assert_eq!(
        puppet.client.activations(Duration::ZERO, fits),
        Ok(()),
        "the request stands"
    );
}

// Whole runs in virtual time.

fn assert_sound(outcome: &Outcome, scenario: &Scenario) {
    assert!(
        outcome.violations.is_empty(),
        "{:#?}\n{scenario:#?}",
        outcome.violations
    );
}

#[test]
fn a_calm_run_does_every_step_with_everybody() {
    for remote_control in [false, true] {
        let scenario = Scenario {
            remote_control,
            ..Scenario::calm(3, 4, 5)
        };
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed));
        assert_eq!(outcome.steps, 20);
        for (number, round) in outcome.rounds.iter().enumerate() {
            assert_eq!(
                round.round,
                RoundKey {
                    round: number as u32,
                    attempt: 0
                }
            );
            assert_eq!((round.included.len(), round.excluded.len()), (3, 0));
        }
        for client in &outcome.clients {
            assert_eq!(client.finished, Some(FinishReason::Completed));
            assert_eq!((client.forwards, client.backwards, client.assigned), (20, 20, 1));
            assert_eq!(client.adapter, outcome.adapter, "everybody ends with the last average");
        }
        assert_eq!((outcome.traffic.lost, outcome.traffic.repeated), (0, 0));
    }
}

/// Clients that arrive one after another, so that they get the same numbers whatever the weather.
fn staggered(weather: Weather, seed: u64) -> Scenario {
    Scenario {
        seed,
        weather,
        wait_for_client: seconds(600),
        faults: (0..3)
            .map(|client| (seconds(120) * client as u32, Fault::Start(client)))
            .collect(),
        ..Scenario::calm(3, 3, 3)
    }
}

#[test]
fn loss_repetition_and_reordering_change_no_bit_of_the_result() {
    let calm = simulate(&staggered(Weather::CALM, 0));
    assert_eq!(calm.end, Some(RunEnd::Completed));
    let mut undisturbed = 0;
    for seed in 0..100 {
        let mut scenario = staggered(Weather::STORM, seed);
        scenario.remote_control = seed % 2 == 1;
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
        assert!(outcome.traffic.lost > 0 && outcome.traffic.repeated > 0);
        // A client whose pings are all lost for fifteen seconds is rightly dropped; that is another run then.
        if outcome.history.iter().any(|(at, phase)| {
            matches!(phase, Phase::Left(_)) && *at < outcome.rounds.last().map_or(*at, |round| round.at)
        }) {
            continue;
        }
        undisturbed += 1;
        assert_eq!(outcome.steps, calm.steps, "no step is computed twice");
        assert_eq!(outcome.adapter, calm.adapter, "seed {seed}");
        assert_eq!(outcome.server, calm.server, "seed {seed}");
        for (stormy, calm) in outcome.clients.iter().zip(&calm.clients) {
            assert_eq!((stormy.forwards, stormy.backwards), (calm.forwards, calm.backwards));
        }
    }
    assert!(undisturbed > 90, "{undisturbed} of 100");
}

/// disco#718: new users cannot join a started run.
#[test]
fn whoever_joins_at_any_moment_takes_part_from_the_next_round() {
    let calm = simulate(&Scenario::calm(2, 5, 3));
    let total = calm.rounds.last().unwrap().at;
    for moment in 0..60 {
        let at = total * moment / 60;
        let mut scenario = Scenario::calm(3, 5, 3);
        scenario.needed = 2;
        scenario.remote_control = moment % 2 == 1;
        scenario.faults = vec![(at, Fault::Start(2))];
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed));
        let since: Vec<bool> = outcome.rounds.iter().map(|round| round.members.contains(&2)).collect();
        assert!(since.is_sorted(), "a member stays one: {since:?}");
        let joined = outcome.history.iter().find(|(_, phase)| *phase == Phase::Joined(2));
        if let Some((joined, _)) = joined {
            // Loading takes at most 600 ms, both handshakes less than 400 ms.
            let ready = *joined + seconds(1);
            for pair in outcome.rounds.windows(2) {
                if pair[0].at > ready {
                    assert!(
                        pair[1].members.contains(&2),
                        "ready at {ready:?}, {:#?}",
                        outcome.rounds
                    );
                }
            }
            assert_eq!(
                outcome.clients[2].finished,
                Some(FinishReason::Completed),
                "{scenario:#?}"
            );
        }
    }
}

#[test]
fn whoever_comes_after_the_end_is_told_so() {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let (_, inside) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    main.stop(Duration::ZERO, "enough".to_owned());
    for credential in [secret(), Credential::Ticket(inside.ticket)] {
        let said = greet(&mut main, 2, Duration::ZERO, &hello(Service::Main, credential));
        assert_eq!(refusal(&said), Some(RefusalReason::NoRun));
    }
    let wrong = hello(Service::Main, Credential::Secret("wrong".to_owned()));
    let said = greet(&mut main, 3, Duration::ZERO, &wrong);
    assert_eq!(
        refusal(&said),
        Some(RefusalReason::SecretWrong),
        "strangers learn nothing of the run"
    );
}

/// disco#171: a ghost client blocks the threshold.
#[test]
fn a_client_that_vanished_before_the_start_does_not_count() {
    let mut scenario = Scenario::calm(3, 2, 2);
    scenario.needed = 2;
    scenario.faults = vec![
        (seconds(2), Fault::Crash(0)),
        (seconds(60), Fault::Start(1)),
        (seconds(90), Fault::Start(2)),
    ];
    let outcome = simulate(&scenario);
    assert_sound(&outcome, &scenario);
    assert_eq!(outcome.end, Some(RunEnd::Completed));
    assert!(
        outcome.rounds.iter().all(|round| round.members == [1, 2]),
        "{:#?}",
        outcome.rounds
    );
}

/// disco#1221: a leaver leaves its contribution, or its place, behind.
#[test]
fn whoever_leaves_in_any_way_at_any_moment_is_out_at_once_and_the_round_ends() {
    let total = simulate(&Scenario::calm(3, 3, 3)).elapsed;
    let ways = [
        Fault::Leave(1),
        Fault::Kill(1),
        Fault::Crash(1),
        Fault::Partition(1, seconds(3600)),
    ];
    for way in ways {
        for moment in 1..40 {
            let mut scenario = Scenario::calm(3, 3, 3);
            scenario.remote_control = moment % 2 == 1;
            scenario.needed = 2;
            scenario.faults = vec![(total * moment / 40, way)];
            scenario.time_limit = seconds(7200);
            let outcome = simulate(&scenario);
            assert_sound(&outcome, &scenario);
            assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
            assert_eq!(outcome.rounds.len(), 3);
            let last = outcome.rounds.last().unwrap().at;
            assert!(
                last < total + silence_limit(PING_INTERVAL) + seconds(1),
                "{last:?} after {way:?}"
            );
        }
    }
}

#[test]
fn with_nobody_left_the_run_waits_and_a_returning_client_goes_on_from_the_last_average() {
    let mut scenario = Scenario::calm(2, 4, 3);
    scenario.wait_for_client = seconds(300);
    scenario.compute = (Duration::from_millis(200), Duration::from_millis(400));
    let calm = simulate(&scenario);
    let middle = (calm.rounds[1].at + calm.rounds[2].at) / 2;
    scenario.faults = vec![
        (middle, Fault::Crash(0)),
        (middle, Fault::Kill(1)),
        (middle + seconds(200), Fault::Start(1)),
    ];
    // Both start at once as well.
    scenario
        .faults
        .extend([(seconds(0), Fault::Start(0)), (seconds(0), Fault::Start(1))]);
    let outcome = simulate(&scenario);
    assert_sound(&outcome, &scenario);
    assert_eq!(outcome.end, Some(RunEnd::Completed), "{outcome:#?}");
    let lost = RoundKey { round: 2, attempt: 0 };
    assert!(
        outcome.history.iter().any(|(_, phase)| *phase == Phase::Lost(lost)),
        "{:#?}",
        outcome.history
    );
    assert!(outcome.history.iter().any(|(_, phase)| *phase == Phase::Waiting));
    let keys: Vec<RoundKey> = outcome.rounds.iter().map(|round| round.round).collect();
    let key = |round, attempt| RoundKey { round, attempt };
    assert_eq!(keys, [key(0, 0), key(1, 0), key(2, 1), key(3, 0)]);
    assert_eq!(outcome.rounds[..2], calm.rounds[..2]);
    assert_eq!(outcome.rounds[2].members, [1]);
}

#[test]
fn with_nobody_left_and_nobody_returning_the_run_stops_with_what_it_has() {
    let mut scenario = Scenario::calm(2, 50, 3);
    scenario.wait_for_client = seconds(45);
    scenario.faults = vec![(seconds(20), Fault::Leave(0)), (seconds(21), Fault::Kill(1))];
    scenario
        .faults
        .extend([(seconds(0), Fault::Start(0)), (seconds(0), Fault::Start(1))]);
    let outcome = simulate(&scenario);
    assert_sound(&outcome, &scenario);
    assert_eq!(outcome.end, Some(RunEnd::NoClients));
    assert!(outcome.drained);
    assert!(!outcome.rounds.is_empty());
    assert_eq!(
        outcome.adapter,
        outcome.rounds.last().unwrap().average,
        "the last average is kept"
    );
    assert!(outcome.elapsed >= seconds(21 + 45) && outcome.elapsed < seconds(21 + 45 + 2));
    assert_eq!(outcome.clients[0].finished, Some(FinishReason::Left));
}

#[test]
fn a_stopped_run_tells_everybody() {
    for moment in 1..30 {
        let mut scenario = Scenario::calm(3, 10, 3);
        scenario.faults = vec![(Duration::from_millis(300) * moment, Fault::Stop)];
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Stopped("stopped".to_owned())));
        assert!(outcome.drained);
        for client in &outcome.clients {
            let told = matches!(client.finished, Some(FinishReason::Stopped { .. }));
            let before_joining = matches!(client.failed, Some(ClientFailure::Refused { .. }));
            assert!(told || before_joining, "{client:?}");
        }
    }
}

/// flower#4844 and MediSwarm#466: a lost connection, or a lost message, hangs the run.
#[test]
fn a_cut_connection_is_made_again_and_nothing_is_loaded_twice() {
    let total = simulate(&Scenario::calm(2, 3, 3)).elapsed;
    for endpoint in [Endpoint::Main, Endpoint::Federated] {
        for moment in 1..50 {
            let mut scenario = Scenario::calm(2, 3, 3);
            scenario.faults = vec![(total * moment / 50, Fault::Cut(1, endpoint))];
            let outcome = simulate(&scenario);
            assert_sound(&outcome, &scenario);
            assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
            for client in &outcome.clients {
                assert_eq!((client.failed.as_ref(), client.assigned), (None, 1), "{scenario:#?}");
            }
            if endpoint == Endpoint::Federated {
                assert_eq!(
                    outcome.steps, 9,
                    "losing the federated server costs no step: {scenario:#?}"
                );
                assert!(
                    outcome.rounds.iter().all(|round| round.included.len() == 2),
                    "{scenario:#?}"
                );
                assert_eq!(outcome.clients[1].adapter, outcome.adapter, "{scenario:#?}");
            }
        }
    }
}

#[test]
fn the_servers_link_may_break_at_any_moment() {
    let base = Scenario {
        remote_control: true,
        ..Scenario::calm(2, 3, 3)
    };
    let calm = simulate(&base);
    for moment in 1..50 {
        let faults = vec![(calm.elapsed * moment / 50, Fault::CutControl)];
        let scenario = Scenario { faults, ..base.clone() };
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
        assert_eq!(outcome.adapter, calm.adapter, "{scenario:#?}");
        assert_eq!(outcome.steps, calm.steps);
    }
}

// Plans: emulated uplinks, phases, and a cut that moves.

/// Frames take no time but what the uplinks take, and every pass takes 100 ms.
fn paced(main_bits_per_s: f64, federated_bits_per_s: f64) -> Scenario {
    Scenario {
        weather: Weather {
            delay: (Duration::ZERO, Duration::ZERO),
            ..Weather::CALM
        },
        compute: (Duration::from_millis(100), Duration::from_millis(100)),
        splits: vec![1, 2, 1],
        rates: LinkRates::new(main_bits_per_s, federated_bits_per_s),
        ..Scenario::calm(3, 3, 2)
    }
}

#[test]
fn an_upload_takes_its_bits_over_the_rate() {
    let pass = Duration::from_millis(100);
    // 1 ms, 64 ms and 4 s a byte; the last lets pings overtake for many times the silence limit.
    for millis_per_byte in [1_u32, 64, 4000] {
        let rate = 8.0 * 1000.0 / f64::from(millis_per_byte);
        let scenario = paced(rate, rate / 2.0);
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed), "{outcome:#?}");
        assert_eq!(outcome.measured.len(), 6);
        for (key, clients) in &outcome.measured {
            assert_eq!(clients.len(), 3, "{key}");
            for times in clients {
                let bytes = u32::try_from(times.bytes_up).unwrap();
                assert_eq!(
                    times.phases.upload,
                    bytes * Duration::from_millis(millis_per_byte.into()),
                    "{key}: {times:?}"
                );
                assert_eq!((times.phases.forward, times.phases.backward), (pass, pass), "{key}");
                assert_eq!(times.phases.download, Duration::ZERO, "only uplinks are emulated");
            }
        }
        for round in &outcome.rounds {
            assert_eq!(round.collected.len(), 3);
            for time in &round.collected {
                let bytes = u32::try_from(time.bytes).unwrap();
                assert_eq!(
                    time.took,
                    bytes * Duration::from_millis(2 * u64::from(millis_per_byte)),
                    "{time:?}"
                );
            }
        }
    }
}

#[test]
fn a_run_without_rates_is_not_paced() {
    let scenario = Scenario {
        rates: None,
        ..paced(1.0, 1.0)
    };
    let outcome = simulate(&scenario);
    assert_sound(&outcome, &scenario);
    let uploads = outcome.measured.iter().flat_map(|(_, clients)| clients);
    assert!(uploads.clone().count() == 18 && uploads.clone().all(|times| times.phases.upload.is_zero()));
}

#[test]
fn wherever_the_cut_moves_the_model_and_its_moments_go_on() {
    let alone = |splits: &[u32]| {
        let scenario = Scenario {
            splits: splits.to_vec(),
            ..Scenario::calm(1, 6, 3)
        };
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed));
        outcome
    };
    let never = alone(&[]);
    for splits in [&[1, 2, 3, 1][..], &[3, 2, 1], &[2], &[1, 3, 1, 3, 2, 3]] {
        let moved = alone(splits);
        assert_eq!(moved.model, never.model, "{splits:?}");
        assert_eq!((moved.server, moved.steps), (never.server, never.steps));
        let changes = splits.windows(2).filter(|pair| pair[0] != pair[1]).count() + usize::from(splits[0] != 1);
        assert_eq!(moved.clients[0].assigned as usize, 1 + changes, "{splits:?}");
        for (index, round) in moved.rounds.iter().enumerate() {
            let at = |round: usize| splits.get(round).or(splits.last()).copied().unwrap();
            assert_eq!(round.average.len(), 8 * at(index) as usize);
            // After the last round nothing follows, so nothing moves.
            let leaving = if index + 1 < moved.rounds.len() {
                at(index).saturating_sub(at(index + 1))
            } else {
                0
            };
            let moments = round.moments.as_ref().map_or(0, |moments| moments.first.len());
            assert_eq!(moments, 8 * leaving as usize, "{splits:?}, round {index}");
        }
    }
}

#[test]
fn moving_cuts_survive_any_weather_bit_by_bit() {
    let calm = simulate(&recutting(Weather::CALM, 0));
    let mut undisturbed = 0;
    for seed in 0..60 {
        let scenario = recutting(Weather::STORM, seed);
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
        let last = outcome.rounds.last().unwrap().at;
        if outcome
            .history
            .iter()
            .any(|(at, phase)| matches!(phase, Phase::Left(_)) && *at < last)
        {
            continue;
        }
        undisturbed += 1;
        assert_eq!(outcome.model, calm.model, "seed {seed}");
        assert_eq!(outcome.steps, calm.steps, "seed {seed}");
    }
    assert!(undisturbed > 40, "{undisturbed} of 60");
}

fn recutting(weather: Weather, seed: u64) -> Scenario {
    Scenario {
        splits: vec![2, 1, 3, 1],
        remote_control: seed % 2 == 1,
        rounds: 4,
        ..staggered(weather, seed)
    }
}

#[test]
fn whoever_comes_or_goes_while_the_cut_moves_does_not_hold_up_the_run() {
    let base = |moment: u32| Scenario {
        splits: vec![1, 3, 2, 1, 3],
        needed: 2,
        remote_control: moment % 2 == 1,
        rates: LinkRates::new(1e5, 1e4),
        time_limit: seconds(7200),
        ..Scenario::calm(3, 5, 2)
    };
    let total = simulate(&base(0)).elapsed;
    let ways = [
        Fault::Leave(1),
        Fault::Kill(1),
        Fault::Crash(1),
        Fault::Partition(1, seconds(3600)),
        Fault::Cut(1, Endpoint::Main),
        Fault::Cut(1, Endpoint::Federated),
        Fault::Start(2),
    ];
    for way in ways {
        for moment in 0..40 {
            let mut scenario = base(moment);
            scenario.faults = vec![(total * moment / 40, way)];
            let outcome = simulate(&scenario);
            assert_sound(&outcome, &scenario);
            assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
            assert_eq!(outcome.rounds.len(), 5);
            for client in [0, 2] {
                let finished = outcome.clients[client].finished.as_ref();
                let late = way == Fault::Start(2) && client == 2;
                assert!(finished == Some(&FinishReason::Completed) || late, "{scenario:#?}");
            }
            for round in &outcome.rounds {
                assert!(round.members.len() >= 2 || round.round.round == 0 || way != Fault::Start(2));
            }
        }
    }
}

fn mixed(cuts: &[u32]) -> Scenario {
    Scenario {
        cuts: cuts.to_vec(),
        ..Scenario::calm(cuts.len(), 4, 3)
    }
}

#[test]
fn equal_cuts_of_their_own_are_one_cut_for_all() {
    for cut in [1, 2, 3] {
        let uniform = Scenario {
            splits: vec![cut],
            ..Scenario::calm(3, 4, 3)
        };
        let (own, one) = (simulate(&mixed(&[cut; 3])), simulate(&uniform));
        assert_sound(&own, &uniform);
        assert_eq!((own.end.as_ref(), own.steps), (Some(&RunEnd::Completed), 12));
        assert_eq!(own.model, one.model, "cut {cut}");
        assert_eq!((own.server, &own.adapter), (one.server, &one.adapter), "cut {cut}");
    }
}

#[test]
fn clients_with_cuts_of_their_own_end_with_the_beginning_of_the_last_average() {
    for cuts in [&[1, 2, 3][..], &[3, 1, 1], &[2, 3, 2], &[3, 1]] {
        for remote_control in [false, true] {
            let scenario = Scenario {
                remote_control,
                ..mixed(cuts)
            };
            let outcome = simulate(&scenario);
            assert_sound(&outcome, &scenario);
            assert_eq!((outcome.end.as_ref(), outcome.steps), (Some(&RunEnd::Completed), 12));
            assert_eq!(outcome.rounds.len(), 4);
            for round in &outcome.rounds {
                assert_eq!(round.included.len(), cuts.len());
                assert_eq!(round.average.len(), 8 * *cuts.iter().max().unwrap() as usize);
            }
            for (client, cut) in outcome.clients.iter().zip(cuts) {
                assert_eq!(client.finished, Some(FinishReason::Completed));
                let len = 8 * *cut as usize;
                assert_eq!(client.adapter, outcome.adapter[..len], "{cuts:?}");
                let averages = outcome.rounds.iter().map(|round| &round.average[..len]);
                assert!(averages.eq(client.installed[1..].iter()), "{cuts:?}");
            }
            assert!(
                outcome.model.starts_with(&outcome.adapter),
                "the main server's copy too"
            );
            assert_eq!(outcome.model.len(), 32);
            assert_eq!(outcome, simulate(&scenario), "a function of its scenario");
        }
    }
}

/// What one client computes does not depend on where its own cut is, alone or beside others.
#[test]
fn whose_cut_is_deepest_makes_no_difference_to_one_clients_run() {
    let alone = |cuts: &[u32]| {
        simulate(&Scenario {
            cuts: cuts.to_vec(),
            ..Scenario::calm(1, 4, 3)
        })
    };
    let (shallow, deep) = (alone(&[1]), alone(&[3]));
    assert_eq!(shallow.model, deep.model);
}

#[test]
fn the_deepest_and_the_shallowest_may_go_in_any_weather() {
    let base = |moment: u32| Scenario {
        seed: u64::from(moment),
        needed: 2,
        remote_control: moment % 2 == 1,
        time_limit: seconds(7200),
        wait_for_client: seconds(400),
        ..mixed(&[1, 2, 3])
    };
    let total = simulate(&base(0)).elapsed;
    for weather in [Weather::CALM, Weather::STORM] {
        for client in [0, 2] {
            let ways = [
                Fault::Leave(client),
                Fault::Kill(client),
                Fault::Crash(client),
                Fault::Cut(client, Endpoint::Main),
                Fault::Cut(client, Endpoint::Federated),
                Fault::CutControl,
            ];
            for way in ways {
                for moment in 0..30 {
                    let back = (total * moment / 30 + seconds(20), Fault::Start(client));
                    let scenario = Scenario {
                        weather,
                        faults: vec![(Duration::ZERO, Fault::Start(client)), (total * moment / 30, way), back],
                        ..base(moment)
                    };
                    let outcome = simulate(&scenario);
                    assert_sound(&outcome, &scenario);
                    assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
                    assert_eq!(outcome.rounds.len(), 4);
                }
            }
        }
    }
}

fn fault(clients: usize) -> impl Strategy<Value = Fault> {
    let client = 0..clients;
    let endpoint = prop_oneof![Just(Endpoint::Main), Just(Endpoint::Federated)];
    prop_oneof![
        3 => client.clone().prop_map(Fault::Start),
        1 => client.clone().prop_map(Fault::Leave),
        1 => client.clone().prop_map(Fault::Crash),
        1 => client.clone().prop_map(Fault::Kill),
        1 => (client.clone(), 1_u64..40).prop_map(|(client, length)| Fault::Partition(client, seconds(length))),
        1 => (client, endpoint).prop_map(|(client, endpoint)| Fault::Cut(client, endpoint)),
        1 => Just(Fault::CutControl),
    ]
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let weather = prop_oneof![3 => Just(Weather::CALM), 1 => Just(Weather::STORM)];
    let plan = (
        prop::collection::vec(1_u32..4, 0..4),
        prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(1_u32..4, 1..5)],
        prop::option::of((1e4..1e7_f64, 1e4..1e7_f64)),
    );
    (
        any::<u64>(),
        weather,
        1_usize..5,
        1_u32..4,
        1_u32..4,
        any::<bool>(),
        plan,
    )
        .prop_flat_map(
            |(seed, weather, clients, rounds, local_steps, remote_control, (splits, cuts, rates))| {
                let moment = (0_u64..60_000).prop_map(Duration::from_millis);
                (
                    1..=clients as u32,
                    prop::collection::vec((moment, fault(clients)), 0..12),
                )
                    .prop_map(move |(needed, mut faults)| {
                        // Everybody starts at some time, and once more when all the trouble is over.
                        for client in 0..clients {
                            faults.push((Duration::from_millis(500 * client as u64), Fault::Start(client)));
                            faults.push((seconds(120), Fault::Start(client)));
                        }
                        Scenario {
                            seed,
                            weather,
                            needed,
                            remote_control,
                            faults,
                            splits: splits.clone(),
                            cuts: cuts.clone(),
                            rates: rates.and_then(|(main, federated)| LinkRates::new(main, federated)),
                            wait_for_client: seconds(400),
                            time_limit: seconds(3600),
                            ..Scenario::calm(clients, rounds, local_steps)
                        }
                    })
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// Whatever happens, the weights of every step add up to 1, nobody who has left contributes, every average is the
    /// mean of what its members sent (`violations`), and the run ends.
    #[test]
    fn whoever_joins_and_leaves_when_the_run_ends_and_every_average_is_right(scenario in scenario()) {
        let outcome = simulate(&scenario);
        prop_assert!(outcome.violations.is_empty(), "{:#?}", outcome.violations);
        prop_assert_eq!(outcome.end, Some(RunEnd::Completed));
        prop_assert!(outcome.drained);
        prop_assert_eq!(outcome.rounds.len() as u32, scenario.rounds);
    }
}

#[test]
fn a_run_is_a_function_of_its_scenario() {
    let scenario = Scenario {
        weather: Weather::STORM,
        seed: 5,
        ..Scenario::calm(3, 2, 2)
    };
    assert_eq!(simulate(&scenario), simulate(&scenario));
    assert_ne!(
        simulate(&scenario).traffic,
        simulate(&Scenario { seed: 6, ..scenario }).traffic
    );
}
