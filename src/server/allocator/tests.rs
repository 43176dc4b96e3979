//! Plans for runs with known speeds: where the cut and the rank must go.

use super::super::planner::ClientRound;
use super::*;
use crate::model::adapter::{LoraSpec, Target};
use crate::model::architecture::Architecture;
use crate::split::Training;
use crate::terms::format::Format;
use crate::terms::optimizer::{OptimizerSettings, Schedule};
use crate::terms::phases::Phases;
use crate::terms::speed::Speed;
use crate::terms::tensor::WireForm;

fn architecture() -> Architecture {
    Architecture::from_json(
        r#"{"model_type":"gpt2","n_layer":6,"n_embd":64,"n_head":4,"vocab_size":300,"n_positions":64}"#,
    )
    .unwrap()
}

fn training() -> Training {
    Training {
        spec: LoraSpec::new(4, 8.0, [Target::AttnQkv]).unwrap(),
        optimizer: OptimizerSettings {
            lr: 1e-3,
            weight_decay: 0.0,
            schedule: Schedule::Constant,
            warmup: 0,
            total_steps: 100,
            clip: None,
        },
        batch: 4,
        seq: 32,
        wire: WireForm::F16,
    }
}

fn client(id: u64, flops_per_s: f64) -> ClientFacts {
    ClientFacts {
        id: ClientId(id),
        name: String::new(),
        device: String::new(),
        memory_bytes: 0,
        speed: Speed::new(flops_per_s, flops_per_s),
    }
}

fn start(clients: Vec<ClientFacts>, server_flops_per_s: f64) -> StartFacts {
    StartFacts {
        cuts: BTreeMap::new(),
        is_resumed: false,
        clients,
        server_flops_per_s: Some(server_flops_per_s),
        cut: 1,
        rank: 4,
        architecture: architecture(),
        training: training(),
        weights: Format::F16,
        rounds: 10,
        local_steps: 5,
    }
}

fn settings() -> Settings {
    Settings {
        scenario: None,
        method: Method::Best,
        seed: 0,
        split: None,
        per_client_split: false,
        rank: None,
        rounds: None,
    }
}

/// A round at `cut` in which client `id` computed at `flops_per_s`, the server at `server_flops_per_s`.
fn round(allocator: &Allocator, cut: usize, speeds: &[(u64, f64)], server_flops_per_s: f64) -> RoundFacts {
    let workload = allocator.run().unwrap().workload();
    let measured = |&(id, speed): &(u64, f64)| ClientRound {
        id: ClientId(id),
        steps: 5,
        phases: Phases {
            forward: workload.client_forward_flops(cut, 4) / speed,
            upload: 0.01,
            download: 0.01,
            backward: workload.client_backward_flops(cut, 4) / speed,
        },
        activation_bits: 1e5,
        gradient_bits: 1e5,
        federated_s: Some(0.01),
        adapter_bits: Some(1e5),
    };
    RoundFacts {
        round: 1,
        rounds: 10,
        cut,
        cuts: BTreeMap::new(),
        rank: 4,
        can_recut: true,
        clients: speeds.iter().map(|&(id, speed)| client(id, speed)).collect(),
        measured: speeds.iter().map(measured).collect(),
        server_s: Some(speeds.len() as f64 * workload.server_flops(cut, 4) / server_flops_per_s),
    }
}

fn decided(decision: Result<Option<Decision>, String>) -> Decision {
    decision.unwrap().unwrap()
}

#[test]
fn a_slow_server_gives_blocks_away_and_slow_clients_keep_few() {
    let clients = || vec![client(1, 1e9), client(2, 1e9)];
    let deep = decided(Allocator::new(settings()).start(&start(clients(), 1e8)));
    let shallow = decided(Allocator::new(settings()).start(&start(clients(), 1e11)));
    assert_eq!((deep.cut, shallow.cut), (5, 1));
    assert_eq!((deep.rank, shallow.rank), (4, 4));
}

fn per_client() -> Settings {
    Settings {
        per_client_split: true,
        ..settings()
    }
}

#[test]
fn a_slow_and_a_fast_client_of_a_slow_server_get_cuts_of_their_own() {
    let clients = || vec![client(1, 1e7), client(2, 1e9)];
    let one = decided(Allocator::new(settings()).start(&start(clients(), 2e8)));
    let mut allocator = Allocator::new(per_client());
    let own = decided(allocator.start(&start(clients(), 2e8)));
    assert!(one.cuts.is_empty());
    let cut = |id| own.cuts[&ClientId(id)];
    assert!(cut(1) < cut(2), "{:?}", own.cuts);
    assert_eq!(own.cut, cut(1), "the smallest");
    let total = |decision: &Decision| decision.prediction.as_ref().unwrap().total_s;
    assert!(total(&own) < total(&one), "{} and {}", total(&own), total(&one));
    // No other cuts are predicted to be faster: all of them are few enough to try.
    let facts = clients();
    for first in 1..6 {
        for second in 1..6 {
            let other = allocator.times(&facts, &[first, second], 4).unwrap().round_s(5);
            assert!(total(&own) <= other * (1.0 + 1e-9), "{first}, {second}: {other}");
        }
    }
    // While cuts differ nothing moves, and what is learned is of each client's own blocks.
    let workload = allocator.run().unwrap().workload();
    let mut facts = round(&allocator, own.cut, &[(1, 1e7), (2, 1e9)], 2e8);
    facts.cuts = own.cuts.clone();
    facts.can_recut = false;
    facts.measured[1].phases.forward = workload.client_forward_flops(cut(2), 4) / 3e9;
    facts.measured[1].phases.backward = workload.client_backward_flops(cut(2), 4) / 3e9;
    let then = decided(allocator.boundary(&facts));
    assert_eq!((then.cut, then.cuts.len()), (own.cut, 0));
    let learned = allocator.known[&ClientId(2)].speed.unwrap();
    assert!((learned.forward_flops_per_s / 3e9 - 1.0).abs() < 1e-9);
    let (before, after) = (own.prediction.unwrap(), then.prediction.unwrap());
    assert!(after.clients[&ClientId(2)].step.forward < before.clients[&ClientId(2)].step.forward);
}

#[test]
fn equal_clients_have_one_cut_for_all() {
    for server in [1e8, 1e11] {
        let clients = vec![client(1, 1e9), client(2, 1e9)];
        let one = decided(Allocator::new(settings()).start(&start(clients.clone(), server)));
        let own = decided(Allocator::new(per_client()).start(&start(clients, server)));
        assert_eq!(own, one);
    }
}

#[test]
fn a_scenario_gives_clients_cuts_of_their_own() {
    let settings = Settings {
        scenario: Some(radio(3)),
        ..per_client()
    };
    let clients = vec![client(1, 1e7), client(2, 1e9), client(3, 1e9)];
    let one = Settings {
        scenario: Some(radio(3)),
        ..self::settings()
    };
    let own = decided(Allocator::new(settings).start(&start(clients.clone(), 2e8)));
    let one = decided(Allocator::new(one).start(&start(clients, 2e8)));
    assert_eq!((own.cuts.len(), own.rates.len()), (3, 3));
    assert_eq!(own.cuts.values().min(), Some(&own.cut));
    assert!(own.cuts[&ClientId(1)] < own.cuts[&ClientId(2)], "{:?}", own.cuts);
    assert!(own.prediction.unwrap().total_s < one.prediction.unwrap().total_s);
}

#[test]
fn a_device_without_the_memory_keeps_the_cut_shallow() {
    let mut small = client(2, 1e9);
    let run = Shape {
        architecture: architecture(),
        training: training(),
        weights: Format::F16,
        local_steps: 5,
    };
    let needed = |cut| run.workload().client_memory_bytes(cut, 4, Format::F16, WireForm::F16) as u64;
    small.memory_bytes = needed(2) + 1;
    let mut allocator = Allocator::new(settings());
    assert_eq!(
        decided(allocator.start(&start(vec![client(1, 1e9), small.clone()], 1e8))).cut,
        2
    );
    small.memory_bytes = needed(1) - 1;
    let error = Allocator::new(settings()).start(&start(vec![client(1, 1e9), small.clone()], 1e8));
    assert!(error.unwrap_err().contains("memory"));
    // Weights in 4 bits leave it more room.
    let mut packed = start(vec![client(1, 1e9), small], 1e8);
    packed.weights = Format::Q4;
    assert!(decided(Allocator::new(settings()).start(&packed)).cut >= 1);
}

#[test]
fn the_cut_moves_when_the_measured_phases_say_it_pays_by_the_margin() {
    let mut allocator = Allocator::new(settings());
    // The server said it was fast, and is not.
    let first = decided(allocator.start(&start(vec![client(1, 1e9), client(2, 1e9)], 1e11)));
    assert_eq!(first.cut, 1);
    let facts = round(&allocator, 1, &[(1, 1e9), (2, 1e9)], 1e8);
    let moved = decided(allocator.boundary(&facts));
    assert_eq!(moved.cut, 5);
    let prediction = moved.prediction.unwrap();
    assert!((prediction.clients[&ClientId(1)].step.upload - 0.01).abs() < 1e-12);

    // Where a block is as fast on either side, nothing pays.
    let mut allocator = Allocator::new(settings());
    decided(allocator.start(&start(vec![client(1, 1e9)], 1e9)));
    let even = round(&allocator, 3, &[(1, 1e9)], 1.02e9);
    assert_eq!(decided(allocator.boundary(&even)).cut, 3);
    let not_now = RoundFacts {
        can_recut: false,
        ..round(&allocator, 3, &[(1, 1e9)], 1e8)
    };
    assert_eq!(decided(allocator.boundary(&not_now)).cut, 3);
    let fixed = Settings {
        split: Some(3),
        ..settings()
    };
    let mut allocator = Allocator::new(fixed);
    assert_eq!(decided(allocator.start(&start(vec![client(1, 1e9)], 1e8))).cut, 3);
    let slow = round(&allocator, 3, &[(1, 1e9)], 1e8);
    assert_eq!(decided(allocator.boundary(&slow)).cut, 3);
}

#[test]
fn the_rank_follows_the_calibrated_rounds() {
    let table =
        |rounds: &str| RoundsTable::from_json(&format!(r#"{{"schema":1,"ranks":[2,16],"rounds":{rounds}}}"#)).unwrap();
    let chosen = |rounds: &str| {
        let settings = Settings {
            rounds: Some(table(rounds)),
            ..settings()
        };
        decided(Allocator::new(settings).start(&start(vec![client(1, 1e9)], 1e9))).rank
    };
    assert_eq!(chosen("[30, 10]"), 16);
    assert_eq!(chosen("[10, 10]"), 2);
}

fn radio(clients: usize) -> Scenario {
    Scenario::preset("selective")
        .unwrap()
        .with(serde_json::json!({
            "clients": { "count": clients },
            "training": { "rounds": { "2": 12.0, "4": 10.0 } },
        }))
        .unwrap()
}

#[test]
fn a_scenario_gives_every_client_the_rates_of_its_plan() {
    let settings = Settings {
        scenario: Some(radio(3)),
        ..settings()
    };
    let mut allocator = Allocator::new(settings);
    let clients: Vec<ClientFacts> = (1..=3).map(|id| client(id, 1e9)).collect();
    let decision = decided(allocator.start(&start(clients, 1e10)));
    assert_eq!(decision.rates.len(), 3);
    let prediction = decision.prediction.unwrap();
    let run = allocator.run().unwrap();
    let workload = run.workload();
    let bits = workload.activation_bits(WireForm::F16) + workload.label_bits();
    for (id, rates) in &decision.rates {
        let predicted = prediction.clients[id];
        assert!((predicted.step.upload * rates.main_bits_per_s / bits - 1.0).abs() < 1e-9);
    }
    // All clients that send end together, so the step is what the model says of any of them.
    let phases: Vec<_> = prediction.clients.values().collect();
    let upload = phases
        .iter()
        .map(|p| p.step.forward + p.step.upload)
        .fold(0.0, f64::max);
    let backward = phases.iter().map(|p| p.step.backward).fold(0.0, f64::max);
    let federated = phases.iter().map(|p| p.federated_s).fold(0.0, f64::max);
    let round_s = 5.0 * (upload + prediction.server_s + backward) + federated;
    assert!((prediction.total_s / round_s - 1.0).abs() < 1e-9);
}

#[test]
fn a_newcomer_takes_the_place_of_the_client_that_left() {
    let settings = Settings {
        scenario: Some(radio(2)),
        ..settings()
    };
    let mut allocator = Allocator::new(settings);
    let first = decided(allocator.start(&start(vec![client(1, 1e9), client(2, 1e9)], 1e10)));
    let facts = round(&allocator, first.cut, &[(1, 1e9), (7, 1e9)], 1e10);
    let then = decided(allocator.boundary(&facts));
    assert_eq!(then.rates[&ClientId(7)], first.rates[&ClientId(2)]);
    assert_eq!(then.rates[&ClientId(1)], first.rates[&ClientId(1)]);
    assert!(!then.rates.contains_key(&ClientId(2)));
}

#[test]
fn a_scenario_for_other_numbers_of_clients_is_refused() {
    let settings = Settings {
        scenario: Some(radio(3)),
        ..settings()
    };
    let error = Allocator::new(settings)
        .start(&start(vec![client(1, 1e9)], 1e10))
        .unwrap_err();
    assert!(error.contains("3 clients") && error.contains("1 joined"), "{error}");
}

#[test]
fn the_papers_methods_are_carried_out_as_they_were_made() {
    for method in [Method::Bcd, Method::A] {
        let settings = Settings {
            scenario: Some(radio(2)),
            method,
            ..settings()
        };
        let mut allocator = Allocator::new(settings);
        let first = decided(allocator.start(&start(vec![client(1, 1e9), client(2, 1e9)], 1e12)));
        let facts = round(&allocator, first.cut, &[(1, 1e9), (2, 1e9)], 1e7);
        let then = decided(allocator.boundary(&facts));
        assert_eq!((then.cut, then.rates), (first.cut, first.rates));
    }
}
