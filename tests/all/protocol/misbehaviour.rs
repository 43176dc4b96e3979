//! Liveness, and misbehaviour: it ends one session, not the run.

use std::time::Duration;

use sflllm::protocol::codec::{encode_checked_frame, encode_message};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::terms::ids::{ClientId, RoundKey, StepKey};
use sflllm::terms::tensor::IGNORED_TARGET;

use super::peer::*;

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
fn activations_damaged_on_the_way_cost_their_sender_the_connection_only() {
    let mut main = MainServerSession::new(main_config(2), Duration::ZERO).unwrap();
    let (mut peer, welcome) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    peer.send(&mut main, &READY);
    let (mut other, _) = Peer::join(&mut main, 2, &hello(Service::Main, secret()));
    other.send(&mut main, &READY);
    events(&mut main);
    let mut damaged = encode_checked_frame(peer.sent, peer.received, &Message::Activations(good_activations()));
    let at = damaged.len() - 1 - 32 - 4;
    damaged[at] ^= 1;
    main.handle_frame(peer.connection, Duration::ZERO, &damaged);
    let said = listen(&mut main, peer.connection);
    assert!(said.closed && said.messages.is_empty(), "{said:?}");
    let left = events(&mut main);
    assert!(
        matches!(
            left.as_slice(),
            [MainEvent::ClientLeft {
                client: ClientId(1),
                reason: DepartureReason::Damaged,
                ..
            }]
        ),
        "{left:?}"
    );
    let (_, again) = Peer::join(&mut main, 3, &hello(Service::Main, Credential::Ticket(welcome.ticket)));
    assert_eq!(again.client, ClientId(1));
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
        let given = events(&mut main);
        let [MainEvent::Contribution { key: KEY, contribution }] = given.as_slice() else {
            panic!("{what}: {given:?}");
        };
        assert_eq!(contribution.client, ClientId(1), "{what}");
        answer(&mut main, 1, 2.0, 0.5).unwrap();
        assert_eq!(closed(&events(&mut main)), Some((KEY, vec![1], vec![2])), "{what}");
    }
}

/// A batch of fewer rows than agreed is what the last of a file is.
#[test]
fn activations_of_fewer_rows_than_agreed_are_taken() {
    let (mut main, [mut one, _]) = gathering();
    let short = Activations {
        examples: 1,
        targets: vec![1, 2],
        tensor: zeros(1, 2, 2),
        ..good_activations()
    };
    let said = one.send(&mut main, &Message::Activations(short));
    assert!(!said.closed, "{said:?}");
    let given = events(&mut main);
    assert!(
        matches!(given.as_slice(), [MainEvent::Contribution { .. }]),
        "{given:?}"
    );
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

/// Whoever knows the join secret can come as somebody new: it is not known to be the same.
#[test]
fn who_was_expelled_does_not_come_in_again_as_the_same_client() {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let (mut liar, welcome) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    let said = liar.send(&mut main, &Message::StepStart(StepStart { key: KEY, members: 1 }));
    assert_eq!(stop_reason(&said), Some(StopReason::Unexpected));
    let again = hello(Service::Main, Credential::Ticket(welcome.ticket));
    for number in [2, 3] {
        let said = greet(&mut main, number, Duration::ZERO, &again);
        assert_eq!(refusal(&said), Some(RefusalReason::Expelled));
    }
    let (_, welcome) = Peer::join(&mut main, 4, &hello(Service::Main, secret()));
    assert_eq!(welcome.client, ClientId(2));
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

fn output(client: u64, loss: f32, value: f32) -> GradientOutput {
    GradientOutput {
        client: ClientId(client),
        loss,
        gradient: tensor(2, 2, 2, value.to_le_bytes().repeat(8)),
    }
}

/// The driver's answer for a member.
fn answer(main: &mut MainServerSession, client: u64, loss: f32, value: f32) -> Result<(), MainError> {
    main.contributed(Duration::ZERO, KEY, ClientId(client), Some(output(client, loss, value)))
}

/// The last step that closed: with whom, and without whom.
pub fn closed(events: &[MainEvent]) -> Option<(StepKey, Vec<u64>, Vec<u64>)> {
    events.iter().rev().find_map(|event| match event {
        MainEvent::CloseStep { key, lanes, left_out } => Some((
            *key,
            lanes.iter().map(|client| client.0).collect(),
            left_out.iter().map(|left_out| left_out.client.0).collect(),
        )),
        _ => None,
    })
}

#[test]
fn a_member_is_answered_at_once_and_the_step_closes_with_all_of_them() {
    let (mut main, mut peers) = gathering();
    peers[1].send(&mut main, &Message::Activations(good_activations()));
    assert_eq!(main.status().phase, RunPhase::Gathering);
    answer(&mut main, 2, 4.0, 0.5).unwrap();
    let said = listen(&mut main, peers[1].connection);
    let [Message::Gradient(gradient)] = said.messages.as_slice() else {
        panic!("{said:?}");
    };
    assert_eq!((gradient.loss, gradient.mean_loss, gradient.tokens), (4.0, 4.0, 3));
    assert_eq!(
        gradient.activations,
        Digest::of(&[0; 32]),
        "the gradient names its activations"
    );
    assert_eq!(closed(&events(&mut main)), None);

    let fewer = Activations {
        targets: vec![1, IGNORED_TARGET, IGNORED_TARGET, IGNORED_TARGET],
        ..good_activations()
    };
    peers[0].send(&mut main, &Message::Activations(fewer));
    assert_eq!(main.status().phase, RunPhase::Computing);
    assert_eq!(listen(&mut main, peers[0].connection).messages, []);
    answer(&mut main, 1, 2.0, 0.5).unwrap();
    let said = listen(&mut main, peers[0].connection);
    let [Message::Gradient(gradient), Message::StepStart(start)] = said.messages.as_slice() else {
        panic!("{said:?}");
    };
    assert_eq!((gradient.loss, gradient.mean_loss, gradient.tokens), (2.0, 3.5, 1));
    assert_eq!((start.key.step, start.members), (1, 2));
    assert_eq!(closed(&events(&mut main)), Some((KEY, vec![1, 2], vec![])));
    // The driver's second word on a member is of no effect.
    answer(&mut main, 1, 2.0, 0.5).unwrap();
    assert_eq!(events(&mut main), []);
}

#[test]
fn who_leaves_while_the_server_computes_gets_no_gradient_and_has_no_part_in_the_step() {
    let (mut main, mut peers) = gathering();
    for peer in &mut peers {
        peer.send(&mut main, &Message::Activations(good_activations()));
    }
    main.disconnected(peers[1].connection, Duration::ZERO);
    answer(&mut main, 1, 2.0, 0.5).unwrap();
    answer(&mut main, 2, 4.0, 0.5).unwrap();
    assert_eq!(closed(&events(&mut main)), Some((KEY, vec![1], vec![2])));
    let said = listen(&mut main, peers[0].connection);
    let [Message::Gradient(gradient), Message::StepStart(start)] = said.messages.as_slice() else {
        panic!("{said:?}");
    };
    assert_eq!((gradient.loss, gradient.mean_loss, gradient.tokens), (2.0, 2.0, 3));
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
        MainEvent::Contribution { .. },
    ] = said.as_slice()
    else {
        panic!("{said:?}");
    };
    assert_eq!(clients.len(), 1);
    assert_eq!(
        clients[0].phases.backward,
        Duration::ZERO,
        "no part takes longer than the whole"
    );
}

/// Also who has been answered: its lane is dropped, as if it had never come.
#[test]
fn who_leaves_before_the_close_has_no_part_in_the_step() {
    let (mut main, mut peers) = gathering();
    peers[1].send(&mut main, &Message::Activations(good_activations()));
    answer(&mut main, 2, 4.0, 0.5).unwrap();
    main.disconnected(peers[1].connection, Duration::ZERO);
    peers[0].send(&mut main, &Message::Activations(good_activations()));
    answer(&mut main, 1, 2.0, 0.5).unwrap();
    assert_eq!(closed(&events(&mut main)), Some((KEY, vec![1], vec![2])));
}

pub fn departures(events: &[MainEvent]) -> Vec<(u64, DepartureReason)> {
    let left = events.iter().filter_map(|event| match event {
        MainEvent::ClientLeft { client, reason, .. } => Some((client.0, reason.clone())),
        _ => None,
    });
    left.collect()
}

#[test]
fn a_member_whose_loss_or_gradient_is_not_finite_is_dropped_and_the_rest_go_on() {
    let bad = [
        None,
        Some(output(2, f32::NAN, 0.5)),
        Some(output(2, 2.0, f32::INFINITY)),
    ];
    for (output, first) in bad
        .into_iter()
        .flat_map(|output| [(output.clone(), true), (output, false)])
    {
        let (mut main, mut peers) = gathering();
        for peer in &mut peers {
            peer.send(&mut main, &Message::Activations(good_activations()));
        }
        let liar = |main: &mut MainServerSession| {
            main.contributed(Duration::ZERO, KEY, ClientId(2), output.clone())
                .unwrap();
        };
        events(&mut main);
        if first {
            liar(&mut main);
            assert_eq!(events(&mut main), [], "it may be the adapter they all start from");
        }
        answer(&mut main, 1, 2.0, 0.5).unwrap();
        if !first {
            liar(&mut main);
        }
        let left = events(&mut main);
        assert_eq!(departures(&left), [(2, DepartureReason::Unusable)]);
        assert_eq!(closed(&left), Some((KEY, vec![1], vec![2])));
        let controls: Vec<Control> = std::iter::from_fn(|| main.poll_control()).collect();
        assert!(controls.contains(&Control::Departed {
            round: KEY.round,
            client: ClientId(2)
        }));
        assert_eq!(main.status().phase, RunPhase::Gathering);
        let said = listen(&mut main, peers[1].connection);
        assert_eq!(stop_reason(&said), Some(StopReason::BadUpdate));
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
    let error = main
        .contributed(Duration::ZERO, KEY, ClientId(1), Some(short))
        .unwrap_err();
    assert_eq!(
        error,
        MainError::GradientLayout {
            client: ClientId(1),
            given: zeros(1, 1, 2).layout(),
            expected: zeros(2, 2, 2).layout(),
        }
    );
}

/// Where no member's loss is finite, the adapter they start from is to blame, or the learning rate, and not all of them.
#[test]
fn a_step_in_which_nobodys_loss_is_finite_rejects_the_round_and_expels_nobody() {
    let (mut main, mut peers) = gathering();
    for attempt in 0..3 {
        let key = StepKey {
            round: RoundKey { round: 0, attempt },
            step: 0,
        };
        for peer in &mut peers {
            let activations = Activations {
                key,
                ..good_activations()
            };
            peer.send(&mut main, &Message::Activations(activations));
        }
        for client in [1, 2] {
            main.contributed(Duration::ZERO, key, ClientId(client), None).unwrap();
        }
        let found = events(&mut main);
        assert_eq!(departures(&found), []);
        let rejected =
            |event: &MainEvent| matches!(event, MainEvent::RoundRejected { round, .. } if *round == key.round);
        assert!(found.iter().any(rejected), "{found:?}");
        let mut all = listen_to_all(&mut main);
        for peer in &mut peers {
            let said = all.remove(&peer.connection).unwrap_or_default();
            peer.received += said.messages.len() as u32;
            match (attempt, said.messages.as_slice()) {
                (0 | 1, [Message::RoundStart(start), Message::StepStart(_)]) => {
                    assert_eq!(
                        start.adapter.as_deref(),
                        Some(&ADAPTER[..]),
                        "from where the round began"
                    );
                }
                (2, [Message::Stop(stop)]) => assert!(stop.detail.contains("--lr"), "{}", stop.detail),
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(main.status().phase, RunPhase::Finished);
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
