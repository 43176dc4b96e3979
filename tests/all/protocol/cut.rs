//! Whole runs with plans: emulated uplinks, phases, and a cut that moves or is each client's own.

use std::time::Duration;

use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Phase, Scenario, Weather, simulate};

use super::peer::*;
use super::run::{assert_sound, staggered};

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
