//! A run whose server was killed: what is kept of it, and how it goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use sflllm::federated::{Exact, Rule};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Outcome, Phase, Scenario, simulate};
use sflllm::terms::adapter::{AdapterShape, MatrixShape, Trained};
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::ids::{ClientId, RoundKey};
use sflllm::terms::moments::Moments;

use super::peer::*;

/// A run with clients 1 to `clients` at the beginning of its first round, their tickets, and what was kept of it.
fn started(clients: u32) -> (MainServerSession, Vec<(Peer, Welcome)>, RunState) {
    let mut main = MainServerSession::new(main_config(clients), Duration::ZERO).unwrap();
    let mut peers: Vec<(Peer, Welcome)> = (1..=u64::from(clients))
        .map(|number| Peer::join(&mut main, number, &hello(Service::Main, secret())))
        .collect();
    for (peer, _) in &mut peers {
        peer.send(&mut main, &READY);
    }
    let state = main.state();
    (main, peers, state)
}

fn resumed(state: &RunState, now: u64) -> MainServerSession {
    // As it is read from disk.
    let state = RunState::decode(&state.encode()).unwrap();
    MainServerSession::resume(main_config(2), &state, 0, seconds(now)).unwrap()
}

fn by_ticket(welcome: &Welcome) -> Hello {
    hello(Service::Main, Credential::Ticket(welcome.ticket.clone()))
}

fn back(main: &mut MainServerSession, connection: u64, welcome: &Welcome, now: u64) -> Peer {
    let said = greet(main, connection, seconds(now), &by_ticket(welcome));
    assert_eq!(super::peer::welcome(&said).client, welcome.client);
    let mut peer = Peer {
        connection: ConnectionId(connection),
        sent: 0,
        received: said.messages.len() as u32,
    };
    peer.send_at(main, seconds(now), &READY);
    peer
}

fn begun(main: &mut MainServerSession) -> Option<(RoundKey, Vec<ClientId>)> {
    events(main).into_iter().find_map(|event| match event {
        MainEvent::RoundStarted { round, members } => Some((round, members)),
        _ => None,
    })
}

#[test]
fn a_round_begins_again_under_another_attempt_when_those_who_were_there_are_back() {
    let (_, peers, state) = started(2);
    assert_eq!(state.round, RoundKey { round: 0, attempt: 0 });
    let mut main = resumed(&state, 100);
    assert_eq!(main.awaited_back().len(), 2);
    back(&mut main, 11, &peers[1].1, 101);
    assert_eq!(begun(&mut main), None, "client 1 is waited for");
    back(&mut main, 12, &peers[0].1, 102);
    let expected = (RoundKey { round: 0, attempt: 1 }, vec![ClientId(1), ClientId(2)]);
    assert_eq!(begun(&mut main), Some(expected));
    assert_eq!(main.awaited_back().len(), 0);
    // And if that is interrupted too, under yet another.
    assert_eq!(resumed(&main.state(), 200).state().round.attempt, 2);
}

#[test]
fn who_does_not_come_back_is_waited_for_as_long_as_for_anybody() {
    let (_, peers, state) = started(2);
    let mut main = resumed(&state, 100);
    // Nobody can know when the server is there again.
    main.handle_timeout(seconds(161));
    assert_eq!(events(&mut main), []);
    main.handle_timeout(seconds(222));
    back(&mut main, 11, &peers[0].1, 230);
    assert_eq!(begun(&mut main), None);
    let due = main.poll_timeout().unwrap();
    assert!(due <= seconds(290), "{due:?}");
    for second in 231..=290 {
        main.handle_frame(ConnectionId(11), seconds(second), &ping());
        main.handle_timeout(seconds(second));
    }
    assert_eq!(begun(&mut main).unwrap().1, [ClientId(1)]);
}

fn ping() -> Vec<u8> {
    use sflllm::protocol::codec::{Frame, encode_frame};
    encode_frame(Frame::Ping {
        nonce: 0,
        acknowledged: 0,
    })
}

#[test]
fn a_number_is_never_given_out_twice_and_who_was_thrown_out_stays_out() {
    let (mut main, mut peers, _) = started(2);
    let (liar, welcome) = &mut peers[1];
    let before = main.revision();
    liar.send(&mut main, &Message::StepStart(StepStart { key: KEY, members: 1 }));
    assert_ne!(main.revision(), before, "it has to be kept before it is said");
    let banned = by_ticket(welcome);
    let state = main.state();
    // Comes after the last that was kept, and is answered at once: its number was kept beforehand.
    let revision = main.revision();
    let (_, late) = Peer::join(&mut main, 3, &hello(Service::Main, secret()));
    assert_eq!((main.revision(), late.client), (revision, ClientId(3)));

    let mut main = resumed(&state, 100);
    assert_eq!(
        refusal(&greet(&mut main, 10, seconds(100), &banned)),
        Some(RefusalReason::Expelled)
    );
    let said = greet(&mut main, 11, seconds(100), &by_ticket(&late));
    assert_eq!(super::peer::welcome(&said).client, late.client);
    let newcomer = welcome_of(&mut main, 12);
    assert!(newcomer.client.0 > 200, "{}", newcomer.client);
    // A ticket for a number that nobody has is not genuine; one that was spent stays spent.
    let mut main = resumed(&state, 100);
    let first = by_ticket(&peers[0].1);
    back(&mut main, 13, &peers[0].1, 100);
    assert_eq!(
        refusal(&greet(&mut main, 14, seconds(100), &first)),
        Some(RefusalReason::TicketSpent)
    );
}

fn welcome_of(main: &mut MainServerSession, connection: u64) -> Welcome {
    super::peer::welcome(&greet(main, connection, seconds(100), &hello(Service::Main, secret())))
}

#[test]
fn numbers_are_kept_before_they_run_out() {
    let config = MainConfig {
        max_clients: 10_000,
        ..main_config(9999)
    };
    let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
    let mut kept = (main.revision(), main.state().next_client);
    for number in 1..=1000 {
        let welcome = welcome_of(&mut main, number);
        if main.revision() != kept.0 {
            kept = (main.revision(), main.state().next_client);
        }
        assert!(welcome.client.0 < kept.1, "{} of {}", welcome.client, kept.1);
    }
}

fn checkpoint() -> Checkpoint {
    let matrix = MatrixShape { inputs: 2, outputs: 1 };
    let shape = AdapterShape::new(2, Trained::Both, vec![matrix]).unwrap();
    Checkpoint {
        round: 7,
        placement: Placement {
            assignment: Assignment {
                weights: vec![Blob {
                    name: "block.0".to_owned(),
                    sha256: Digest::of(b"x"),
                    bytes: 5,
                }],
                alphas: vec![OwnAlpha {
                    block: 0,
                    target: "c_attn".to_owned(),
                    alpha: 3.0,
                }],
                ..reassignment()
            },
            adapter: vec![1.0, f32::MIN_POSITIVE, -0.0],
            moments: Some(Moments {
                steps: 3,
                first: vec![0.5],
                second: vec![0.25],
            }),
            cuts: BTreeMap::from([(ClientId(4), 2), (ClientId(u64::MAX), 1)]),
            rule: Rule::new(Aggregation::Flora, shape),
            ranks: vec![2, 1],
        },
        adapter: vec![0.125; 3],
        moments: Moments::zero(3),
        exact: Some(Exact {
            ranks: vec![1, 0],
            values: vec![0.5, -0.25, f32::MIN_POSITIVE],
        }),
    }
}

#[test]
fn what_is_kept_is_read_as_it_was_and_nothing_else_is_read() {
    let checkpoint = checkpoint();
    assert!(checkpoint.placement.rule.is_some());
    let bytes = checkpoint.encode();
    assert_eq!(Checkpoint::decode(&bytes).unwrap(), checkpoint);
    let mut plain = checkpoint.clone();
    (plain.placement.rule, plain.placement.ranks, plain.exact) = (None, Vec::new(), None);
    assert_eq!(Checkpoint::decode(&plain.encode()).unwrap(), plain);
    let (_, _, state) = started(3);
    let members = state.encode();
    assert_eq!(RunState::decode(&members).unwrap(), state);
    for (bytes, what) in [(&bytes, "checkpoint"), (&members, "members")] {
        for length in 0..bytes.len() {
            assert!(Checkpoint::decode(&bytes[..length]).is_err() && RunState::decode(&bytes[..length]).is_err());
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(
            Checkpoint::decode(&longer).is_err() && RunState::decode(&longer).is_err(),
            "{what}"
        );
        let mut other = bytes.clone();
        other[0] += 1;
        let error = (Checkpoint::decode(&other).unwrap_err()).to_string();
        assert!(error.contains("version of a run's state"), "{error}");
    }
}

#[test]
fn who_missed_the_end_of_a_run_is_told_of_it_and_waited_for_as_long_as_for_anybody() {
    let (_, peers, state) = started(2);
    let ended = |now| MainServerSession::resume(main_config(2), &state, 2, seconds(now)).unwrap();
    let drained = |main: &mut MainServerSession| events(main).contains(&MainEvent::Drained);
    let mut main = ended(100);
    assert!(events(&mut main).contains(&MainEvent::Finished {
        reason: RunEnd::Completed
    }));
    main.handle_timeout(seconds(101));
    assert!(!drained(&mut main));
    for (connection, (_, welcome)) in (20..).zip(&peers) {
        assert!(!drained(&mut main));
        let said = greet(&mut main, connection, seconds(102), &by_ticket(welcome));
        let Some(Message::Stop(stop)) = said.messages.last() else {
            panic!("{said:?}")
        };
        assert_eq!((stop.reason, said.closed), (StopReason::Completed, false));
        main.disconnected(ConnectionId(connection), seconds(102));
    }
    assert!(drained(&mut main));
    let newcomer = greet(&mut ended(100), 30, seconds(102), &hello(Service::Main, secret()));
    assert_eq!(refusal(&newcomer), Some(RefusalReason::NoRun));
    let mut main = ended(100);
    main.handle_timeout(seconds(160));
    assert!(drained(&mut main));
}

/// A run in which every contribution counts in the end, because no round goes on without anybody.
fn of_three(remote_control: bool) -> Scenario {
    Scenario {
        remote_control,
        quorum: Some(3),
        wait_for_client: seconds(600),
        ..Scenario::calm(3, 3, 2)
    }
}

fn assert_same(outcome: &Outcome, undisturbed: &Outcome, what: &str) {
    assert_eq!(outcome.violations, Vec::<String>::new(), "{what}");
    assert_eq!(outcome.end, Some(RunEnd::Completed), "{what}: {:?}", outcome.history);
    let model = |outcome: &Outcome| (outcome.model.clone(), outcome.server);
    assert_eq!(model(outcome), model(undisturbed), "{what}: {:?}", outcome.history);
}

#[test]
fn a_server_that_dies_whenever_it_has_kept_something_ends_with_the_weights_of_one_that_lives() {
    for remote_control in [false, true] {
        let undisturbed = simulate(&of_three(remote_control));
        assert_same(&undisturbed, &undisturbed, "undisturbed");
        let killed = |outcome: &Outcome| outcome.history.iter().any(|(_, phase)| *phase == Phase::Killed);
        // Members and the beginning are written before anybody can come.
        let mut writes = 3;
        loop {
            let scenario = Scenario {
                kept_and_killed: vec![(writes, seconds(20)), (writes + 2, seconds(3))],
                ..of_three(remote_control)
            };
            let outcome = simulate(&scenario);
            if !killed(&outcome) {
                break;
            }
            assert_same(&outcome, &undisturbed, &format!("killed at write {writes}"));
            writes += 1;
        }
        // The beginning, members and the beginning again of every round, and the end.
        assert!(writes > 7, "{writes}");
    }
}

#[test]
fn whenever_a_process_dies_the_run_ends_with_the_weights_of_one_in_which_none_does() {
    let undisturbed = simulate(&of_three(false));
    let most = undisturbed.elapsed.as_millis() as u64;
    // The numbers of clients are the order in which they are summed.
    let joined = |(at, phase): &(Duration, Phase)| matches!(phase, Phase::Joined(_)).then_some(*at);
    let first = undisturbed.history.iter().filter_map(joined).max().unwrap().as_millis() as u64 + 100;
    for at in (first..most).step_by(130) {
        let at = Duration::from_millis(at);
        let client = at.as_millis() as usize / 130 % 3;
        for (what, faults) in [
            ("the server", vec![(at, Fault::KillServer(seconds(7)))]),
            (
                "a client",
                vec![(at, Fault::Kill(client)), (at + seconds(5), Fault::Start(client))],
            ),
            (
                "both",
                vec![
                    (at, Fault::Kill(client)),
                    (at + seconds(1), Fault::KillServer(seconds(20))),
                    (at + seconds(40), Fault::Start(client)),
                ],
            ),
        ] {
            // Who is started again would else start only then.
            let starts = (0..3).map(|client| (Duration::ZERO, Fault::Start(client)));
            let scenario = Scenario {
                faults: starts.chain(faults).collect(),
                ..of_three(false)
            };
            assert_same(&simulate(&scenario), &undisturbed, &format!("{what} at {at:?}"));
        }
    }
}
