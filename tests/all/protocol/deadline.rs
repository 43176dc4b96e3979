//! Nobody is waited for without end: who is late is left out, who is late three times running is out of the run.

use std::time::Duration;

use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Phase, Scenario, Weather, simulate};
use sflllm::terms::ids::{ClientId, RoundKey, StepKey};

use super::misbehaviour::{closed, departures};
use super::peer::*;
use super::run::assert_sound;

/// A run of members that wait for each other's first activations, each of whom answers pings.
struct Run {
    main: MainServerSession,
    peers: Vec<Peer>,
    tickets: Vec<Ticket>,
    now: Duration,
    events: Vec<MainEvent>,
}

impl Run {
    fn new(members: u64, change: impl Fn(&mut MainConfig)) -> Run {
        Run::speaking(&vec![PROTOCOL_VERSION; members as usize], change)
    }

    fn speaking(versions: &[Version], change: impl Fn(&mut MainConfig)) -> Run {
        let mut config = main_config(versions.len() as u32);
        config.deadline = Deadline::After(seconds(10));
        // Nobody is silent here.
        config.ping_interval = seconds(100_000);
        change(&mut config);
        let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
        let mut peers = Vec::new();
        let mut tickets = Vec::new();
        for (number, version) in (1..).zip(versions) {
            let greeting = Hello {
                version: *version,
                ..hello(Service::Main, secret())
            };
            let (peer, welcome) = Peer::join(&mut main, number, &greeting);
            peers.push(peer);
            tickets.push(welcome.ticket);
        }
        for peer in &mut peers {
            peer.send(&mut main, &READY);
        }
        let mut run = Run {
            main,
            peers,
            tickets,
            now: Duration::ZERO,
            events: Vec::new(),
        };
        run.events();
        run
    }

    fn events(&mut self) -> Vec<MainEvent> {
        self.events = events(&mut self.main);
        self.events.clone()
    }

    /// Lets time pass up to a moment, ringing when the session asks to.
    fn pass(&mut self, to: Duration) {
        while let Some(at) = self.main.poll_timeout().filter(|at| *at <= to) {
            self.now = self.now.max(at);
            self.main.handle_timeout(self.now);
        }
        self.now = to;
    }

    fn send(&mut self, client: u64, message: &Message) -> Said {
        let now = self.now;
        self.peers[client as usize - 1].send_at(&mut self.main, now, message)
    }

    /// The member's part of a step, from its activations to its gradient and its word that it is done.
    fn contribute(&mut self, client: u64, key: StepKey) {
        self.activations(client, key);
        self.done(client, key);
    }

    fn activations(&mut self, client: u64, key: StepKey) {
        let activations = Activations {
            key,
            ..good_activations()
        };
        let said = self.send(client, &Message::Activations(activations));
        assert!(!said.closed, "{said:?}");
        let output = GradientOutput {
            client: ClientId(client),
            loss: 1.0,
            gradient: zeros(2, 2, 2),
        };
        let now = self.now;
        self.main.contributed(now, key, ClientId(client), Some(output)).unwrap();
    }

    fn done(&mut self, client: u64, key: StepKey) {
        let backward = Duration::ZERO;
        let said = self.send(client, &Message::StepDone(StepDone { key, backward }));
        assert!(!said.closed, "{said:?}");
    }

    /// The federated server has a member's adapter.
    fn received(&mut self, client: u64, round: RoundKey) {
        let reply = ControlReply::Received {
            round,
            client: ClientId(client),
            bytes: 1,
        };
        let now = self.now;
        self.main.handle_control(now, reply);
    }
}

fn key(step: u32) -> StepKey {
    StepKey { step, ..KEY }
}

#[test]
fn a_step_closes_at_the_deadline_with_those_who_have_come_and_who_was_late_is_in_the_next() {
    let mut run = Run::new(3, |_| {});
    run.contribute(1, key(0));
    run.pass(seconds(4));
    run.contribute(2, key(0));
    run.pass(seconds(10) - Duration::from_nanos(1));
    assert_eq!(closed(&run.events()), None);
    run.pass(seconds(10));
    let found = run.events();
    assert_eq!(closed(&found), Some((key(0), vec![1, 2], vec![3])));
    let Some(MainEvent::CloseStep { left_out, .. }) =
        found.iter().find(|event| matches!(event, MainEvent::CloseStep { .. }))
    else {
        panic!("{found:?}")
    };
    assert_eq!(left_out[0].reason, "its activations had not come after 10.0 s");
    assert_eq!(departures(&found), []);
    // What it sends of that step was on its way, and is nothing any more.
    run.pass(seconds(11));
    run.send(3, &Message::Activations(good_activations()));
    assert_eq!(run.events(), []);
    for client in [1, 2, 3] {
        run.contribute(client, key(1));
    }
    assert_eq!(closed(&run.events()), Some((key(1), vec![1, 2, 3], vec![])));
}

#[test]
fn who_is_late_three_times_running_is_out_of_the_run_and_does_not_come_in_again_by_its_ticket() {
    let with = |change: fn(&mut RunConfig)| Run::new(2, move |config| change(&mut config.placement.assignment.config));
    let mut run = with(|config| config.local_steps = 9);
    for step in 0..2 {
        run.contribute(1, key(step));
        run.pass(seconds(10) * (step + 1));
        assert_eq!(departures(&run.events()), [], "step {step}");
    }
    run.contribute(1, key(2));
    run.pass(seconds(30));
    assert_eq!(departures(&run.events()), [(2, DepartureReason::Late("activations"))]);
    let said = listen(&mut run.main, run.peers[1].connection);
    assert_eq!(stop_reason(&said), Some(StopReason::Late));
    for ticket in &run.tickets[1..] {
        let greeting = hello(Service::Main, Credential::Ticket(ticket.clone()));
        let said = greet(&mut run.main, 7, run.now, &greeting);
        assert_eq!(refusal(&said), Some(RefusalReason::Expelled));
    }
    assert_eq!(run.main.status().clients.len(), 1, "the other goes on");

    // Twice, and in time, and twice again, is not three times running.
    let mut run = with(|config| config.local_steps = 9);
    for step in 0..6 {
        run.contribute(1, key(step));
        match step {
            2 => run.contribute(2, key(step)),
            _ => run.pass(run.now + seconds(10)),
        }
        let expected = if step < 5 { 0 } else { 1 };
        assert_eq!(departures(&run.events()).len(), expected, "step {step}");
    }
}

#[test]
fn where_nobody_has_come_nobody_is_kept_waiting_and_the_wait_is_longer() {
    let mut run = Run::new(1, |config| config.deadline = Deadline::Auto);
    run.pass(Deadline::LONGEST * 3 - Duration::from_nanos(1));
    assert_eq!(departures(&run.events()), []);
    run.pass(Deadline::LONGEST * 3);
    assert_eq!(departures(&run.events()), [(1, DepartureReason::Late("activations"))]);
}

#[test]
fn a_quorum_is_waited_for_until_those_who_are_missing_are_out_of_the_run() {
    let mut run = Run::new(3, |config| config.quorum = Some(3));
    run.contribute(1, key(0));
    run.contribute(2, key(0));
    run.pass(seconds(29));
    assert_eq!(closed(&run.events()), None);
    run.pass(seconds(30));
    let found = run.events();
    assert_eq!(departures(&found), [(3, DepartureReason::Late("activations"))]);
    assert_eq!(closed(&found), Some((key(0), vec![1, 2], vec![3])));

    let mut run = Run::new(3, |config| config.quorum = Some(2));
    run.contribute(1, key(0));
    run.pass(seconds(10));
    assert_eq!(closed(&run.events()), None, "one is not two");
    run.pass(seconds(12));
    run.contribute(2, key(0));
    assert_eq!(closed(&run.events()), None, "the third has the rest of its time");
    run.pass(seconds(20));
    assert_eq!(closed(&run.events()), Some((key(0), vec![1, 2], vec![3])));
}

#[test]
fn a_round_that_lost_its_quorum_is_begun_again_by_all_of_it_or_after_the_wait_by_who_is_there() {
    let lost = |found: &[MainEvent]| found.iter().any(|event| matches!(event, MainEvent::RoundLost { .. }));
    let begun = |found: &[MainEvent]| {
        found.iter().find_map(|event| match event {
            MainEvent::RoundStarted { round, members } => Some((round.attempt, members.len())),
            _ => None,
        })
    };
    let interrupted = || {
        let mut run = Run::new(3, |config| config.quorum = Some(3));
        run.contribute(1, key(0));
        let connection = run.peers[2].connection;
        run.main.disconnected(connection, run.now);
        let found = run.events();
        assert!(lost(&found) && begun(&found).is_none(), "{found:?}");
        // What the others still send of it is nothing any more.
        run.send(2, &Message::Activations(good_activations()));
        assert_eq!(run.events(), []);
        run
    };
    let mut run = interrupted();
    run.pass(seconds(30));
    let again = hello(Service::Main, Credential::Ticket(run.tickets[2].clone()));
    let said = greet(&mut run.main, 13, run.now, &again);
    let mut back = Peer {
        connection: ConnectionId(13),
        sent: 0,
        received: said.messages.len() as u32,
    };
    back.send_at(&mut run.main, run.now, &READY);
    assert_eq!(begun(&run.events()), Some((1, 3)));

    let mut run = interrupted();
    run.pass(seconds(59));
    assert_eq!(run.events(), []);
    run.pass(seconds(61));
    assert_eq!(begun(&run.events()), Some((1, 2)));

    // Nobody waits for who has said goodbye.
    let mut run = Run::new(3, |config| config.quorum = Some(3));
    run.contribute(1, key(0));
    run.send(3, &Message::Leave);
    let found = run.events();
    assert!(!lost(&found), "{found:?}");
    run.contribute(2, key(0));
    assert_eq!(closed(&run.events()), Some((key(0), vec![1, 2], vec![3])));
}

#[test]
fn a_liar_among_slow_members_does_not_close_a_step_in_their_place() {
    let mut run = Run::new(2, |_| {});
    run.send(2, &Message::Activations(good_activations()));
    run.main.contributed(run.now, KEY, ClientId(2), None).unwrap();
    run.pass(seconds(15));
    assert_eq!(
        closed(&run.events()),
        None,
        "one wait is over, and who is late is waited for again"
    );
    run.contribute(1, key(0));
    let found = run.events();
    assert_eq!(departures(&found), [(2, DepartureReason::Unusable)]);
    assert_eq!(closed(&found), Some((key(0), vec![1], vec![2])));
}

/// A run of two whose steps are done, waiting for adapters.
fn averaging() -> Run {
    let mut run = Run::new(2, |_| {});
    for step in 0..2 {
        for client in [1, 2] {
            run.contribute(client, key(step));
        }
    }
    run.events();
    assert_eq!(run.main.status().phase, RunPhase::Averaging);
    while run.main.poll_control().is_some() {}
    run
}

#[test]
fn a_round_is_averaged_at_the_deadline_and_who_was_late_starts_the_next_from_the_average() {
    let mut run = averaging();
    run.received(1, KEY.round);
    run.pass(seconds(10));
    let control = run.main.poll_control();
    let departed = Control::Departed {
        round: KEY.round,
        client: ClientId(2),
    };
    assert_eq!(control, Some(departed));
    assert_eq!(departures(&run.events()), []);
    // As the federated server then says.
    let average = ADAPTER.map(|value| value + 1e-3).to_vec();
    let closed = RoundClosed {
        round: KEY.round,
        included: vec![Inclusion {
            client: ClientId(1),
            examples: 4,
        }],
        excluded: vec![Exclusion {
            client: ClientId(2),
            reason: ExclusionReason::Departed,
        }],
        average: Some(Mean {
            digest: Digest::of_values(&average),
            values: average.clone(),
            moments: None,
            exact: None,
            errors: None,
        }),
    };
    run.main.handle_control(run.now, ControlReply::RoundClosed(closed));
    let found = run.events();
    let [MainEvent::RoundClosed { excluded, .. }] = found.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!(excluded[0].reason, ExclusionReason::Late);
    listen_to_all(&mut run.main);
    run.main.validated(run.now, KEY.round, Some(1.0), None).unwrap();
    let mut said = listen_to_all(&mut run.main);
    for (peer, gets) in run.peers.iter().zip([None, Some(average)]) {
        let said = said.remove(&peer.connection).unwrap();
        let start = said.messages.iter().find_map(|message| match message {
            Message::RoundStart(start) => Some(start.adapter.clone()),
            _ => None,
        });
        assert_eq!(start, Some(gets), "{said:?}");
    }
}

#[test]
fn a_step_that_a_member_never_finishes_does_not_hold_the_round() {
    let mut run = Run::new(2, |_| {});
    for step in 0..2 {
        run.contribute(1, key(step));
        run.activations(2, key(step));
        if step == 0 {
            run.done(2, key(step));
        }
    }
    assert_eq!(run.main.status().phase, RunPhase::Boundary);
    run.pass(seconds(10));
    assert_eq!(run.main.status().phase, RunPhase::Averaging);
    let members = run.main.status().clients.into_iter().filter(|client| client.member);
    assert_eq!(members.map(|client| client.client.0).collect::<Vec<_>>(), [1]);
    run.done(2, key(1));
    assert_eq!(departures(&run.events()), []);
}

#[test]
fn a_client_that_cannot_be_left_out_comes_again() {
    let old = Version { major: 3, minor: 1 };
    let mut run = Run::speaking(&[PROTOCOL_VERSION, old], |_| {});
    run.contribute(1, key(0));
    run.pass(seconds(10));
    let found = run.events();
    assert_eq!(
        departures(&found),
        [(2, DepartureReason::Excluded(ExclusionReason::Late))]
    );
    let said = listen(&mut run.main, run.peers[1].connection);
    assert_eq!(stop_reason(&said), Some(StopReason::Excluded));
    let greeting = Hello {
        version: old,
        ..hello(Service::Main, Credential::Ticket(run.tickets[1].clone()))
    };
    let said = greet(&mut run.main, 7, run.now, &greeting);
    assert_eq!(welcome(&said).client, ClientId(2));
}

/// A step that everybody sends nonsense for leaves the run where it was.
#[test]
fn an_average_that_no_training_leads_to_is_not_taken() {
    let mut run = averaging();
    for attempt in 0..3 {
        let round = RoundKey { round: 0, attempt };
        let poison = vec![ADAPTER[0], 1e37, ADAPTER[2], ADAPTER[3]];
        let closed = RoundClosed {
            round,
            included: vec![Inclusion {
                client: ClientId(1),
                examples: 4,
            }],
            excluded: Vec::new(),
            average: Some(Mean {
                digest: Digest::of_values(&poison),
                values: poison,
                moments: None,
                exact: None,
                errors: None,
            }),
        };
        run.main.handle_control(run.now, ControlReply::RoundClosed(closed));
        let found = run.events();
        assert_eq!(departures(&found), [], "who sent it is not known here");
        let rejected = found.iter().any(|event| {
            matches!(event, MainEvent::RoundRejected { round: rejected, reason } if *rejected == round && reason.contains("1.000e37"))
        });
        assert!(rejected, "{found:?}");
        if attempt < 2 {
            let next = RoundKey {
                round: 0,
                attempt: attempt + 1,
            };
            for step in 0..2 {
                for client in [1, 2] {
                    run.contribute(client, next.step(step));
                }
            }
            run.events();
        } else {
            assert!(
                matches!(
                    found.last(),
                    Some(MainEvent::Finished {
                        reason: RunEnd::Diverged(_)
                    })
                ),
                "{found:?}"
            );
        }
    }
}

#[test]
fn a_validation_loss_that_is_not_finite_begins_the_round_again_from_what_it_began_with() {
    for loss in [f64::NAN, f64::INFINITY] {
        let mut run = averaging();
        let values = ADAPTER.map(|value| value + 1e-3).to_vec();
        let closed = RoundClosed {
            round: KEY.round,
            included: vec![Inclusion {
                client: ClientId(1),
                examples: 4,
            }],
            excluded: Vec::new(),
            average: Some(Mean {
                digest: Digest::of_values(&values),
                values,
                moments: None,
                exact: None,
                errors: None,
            }),
        };
        run.main.handle_control(run.now, ControlReply::RoundClosed(closed));
        run.events();
        listen_to_all(&mut run.main);
        run.main.validated(run.now, KEY.round, Some(loss), None).unwrap();
        let found = run.events();
        assert!(
            matches!(
                found.as_slice(),
                [MainEvent::RoundRejected { .. }, MainEvent::RoundStarted { .. }]
            ),
            "{found:?}"
        );
        let mut said = listen_to_all(&mut run.main);
        for peer in &run.peers {
            let said = said.remove(&peer.connection).unwrap();
            let [Message::RoundStart(start), Message::StepStart(_)] = said.messages.as_slice() else {
                panic!("{said:?}")
            };
            assert_eq!(start.round, RoundKey { round: 0, attempt: 1 });
            assert_eq!(start.adapter.as_deref(), Some(&ADAPTER[..]));
        }
        assert!(!said.values().any(|said| said.closed));
    }
}

/// A part of a frame is a sign of life.
#[test]
fn who_sends_a_large_frame_slowly_is_not_silent() {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let (slow, _) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    for now in (0..300).map(seconds) {
        main.handle_timeout(now);
        main.heard(slow.connection);
    }
    assert_eq!(departures(&events(&mut main)), []);
    for now in (300..320).map(seconds) {
        main.handle_timeout(now);
    }
    assert_eq!(departures(&events(&mut main)), [(1, DepartureReason::Silent)]);
    // Bytes before a greeting are none.
    main.connected(ConnectionId(2), seconds(320));
    main.heard(ConnectionId(2));
    main.handle_timeout(seconds(336));
    assert!(listen(&mut main, ConnectionId(2)).closed);
}

/// A run of three of whom one is busy with something else for a while.
fn stalled(deadline: Deadline, at: u64, length: u64) -> Scenario {
    Scenario {
        deadline,
        faults: vec![(seconds(at), Fault::Stall(2, seconds(length)))],
        ..Scenario::calm(3, 4, 5)
    }
}

#[test]
fn a_client_that_is_busy_for_a_while_costs_the_others_the_deadline_and_goes_on() {
    let calm = simulate(&Scenario::calm(3, 4, 5));
    for at in 1..8 {
        let scenario = stalled(Deadline::After(seconds(5)), at, 8);
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed));
        assert_eq!(outcome.steps, calm.steps);
        assert!(
            outcome.elapsed < calm.elapsed + seconds(8),
            "{:?} {:?}",
            outcome.elapsed,
            calm.elapsed
        );
        assert!(outcome.partial.iter().all(|(_, late)| late == &[2]));
        assert_eq!(
            outcome.clients[2].finished,
            Some(FinishReason::Completed),
            "{outcome:#?}"
        );
        assert_eq!(outcome.clients[2].adapter, outcome.adapter);
    }
}

#[test]
fn a_client_that_never_comes_again_is_out_after_three_deadlines() {
    for at in 1..8 {
        let scenario = stalled(Deadline::After(seconds(5)), at, 100_000);
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed));
        assert!(outcome.history.iter().any(|(_, phase)| *phase == Phase::Left(2)));
        assert!(
            matches!(
                &outcome.clients[2].failed,
                Some(ClientFailure::Stopped { stop, .. }) if stop.reason == StopReason::Late
            ),
            "{outcome:#?}"
        );
        assert!(outcome.clients[..2].iter().all(|client| client.failed.is_none()));
    }
}

#[test]
fn in_a_storm_with_deadlines_every_run_ends_with_averages_of_those_who_came() {
    let mut partial = 0;
    for seed in 0..60 {
        let scenario = Scenario {
            seed,
            weather: Weather::STORM,
            wait_for_client: seconds(400),
            remote_control: seed % 2 == 1,
            quorum: (seed % 3 == 0).then_some(2),
            ..stalled(Deadline::After(seconds(8)), seed % 20, 12)
        };
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert!(
            matches!(outcome.end, Some(RunEnd::Completed | RunEnd::NoClients)),
            "{scenario:#?}"
        );
        partial += outcome.partial.len();
    }
    assert!(partial > 20, "{partial}");
}
