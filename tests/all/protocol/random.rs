//! Whole runs at random: whatever happens, no rule is broken and the run ends.

use std::time::Duration;

use proptest::prelude::*;
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Scenario, Weather, simulate};

use sflllm::terms::aggregation::Aggregation;

use super::peer::*;

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
        1 => (1_u64..40).prop_map(|length| Fault::KillServer(seconds(length))),
    ]
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let weather = prop_oneof![3 => Just(Weather::CALM), 1 => Just(Weather::STORM)];
    let plan = (
        prop::collection::vec(1_u32..4, 0..4),
        prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(1_u32..4, 1..5)],
        prop::option::of((1e4..1e7_f64, 1e4..1e7_f64)),
        (
            prop::sample::select(Aggregation::ALL),
            prop::collection::vec((3_u32..12, (1_u64..40).prop_map(seconds)), 0..3),
        ),
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
            |(seed, weather, clients, rounds, local_steps, remote_control, (splits, cuts, rates, last))| {
                let (aggregation, kept_and_killed) = last;
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
                            aggregation,
                            kept_and_killed: kept_and_killed.clone(),
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

    /// Whatever happens, the weights of every step add up to 1, nobody who has left contributes, every average is
    /// what its rule makes of what its members sent (`violations`), and the run ends.
    #[test]
    fn whoever_joins_and_leaves_when_the_run_ends_and_every_average_is_right(scenario in scenario()) {
        let outcome = simulate(&scenario);
        prop_assert!(outcome.violations.is_empty(), "{:#?}", outcome.violations);
        prop_assert_eq!(outcome.end, Some(RunEnd::Completed));
        prop_assert!(outcome.drained);
        prop_assert_eq!(outcome.rounds.len() as u32, scenario.rounds);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// The same where nobody is waited for longer than a few seconds, whether it is away, busy or slow. Then a run may also end
    /// because everybody was late too often.
    #[test]
    fn whoever_is_late_every_step_has_who_came_and_every_average_is_right(
        scenario in scenario(),
        deadline in 1_u64..12,
        quorum in prop::option::of(1_u32..4),
        stalls in prop::collection::vec((0_u64..60, 0_usize..4, 1_u64..60), 1..6),
    ) {
        let stalls = stalls
            .into_iter()
            .filter(|(_, client, _)| *client < scenario.clients)
            .map(|(at, client, length)| (seconds(at), Fault::Stall(client, seconds(length))));
        let scenario = Scenario {
            deadline: Deadline::After(seconds(deadline)),
            quorum,
            faults: scenario.faults.iter().copied().chain(stalls).collect(),
            ..scenario
        };
        let outcome = simulate(&scenario);
        prop_assert!(outcome.violations.is_empty(), "{:#?}", outcome.violations);
        prop_assert!(
            matches!(outcome.end, Some(RunEnd::Completed | RunEnd::NoClients)),
            "{:?} after {:?}", outcome.end, outcome.elapsed
        );
        prop_assert!(outcome.drained);
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
