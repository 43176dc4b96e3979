//! Whole runs in virtual time: whoever comes and goes, whatever the network does.

use std::time::Duration;

use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Outcome, Phase, Scenario, Weather, simulate};
use sflllm::terms::ids::RoundKey;

use super::peer::*;

pub fn assert_sound(outcome: &Outcome, scenario: &Scenario) {
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
pub fn staggered(weather: Weather, seed: u64) -> Scenario {
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
