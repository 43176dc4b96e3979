//! How a run's adapters are aggregated, as the two servers agree on it.

use std::time::Duration;

use sflllm::federated::{Errors, Exact, Rule};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Scenario, Weather, simulate};
use sflllm::terms::adapter::{AdapterShape, MatrixShape};
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::ids::{ClientId, RunId};
use sflllm::terms::moments::MomentPolicy;

use super::peer::*;
use super::run::assert_sound;

/// One matrix of one column and one row: at rank 2 the four values of the usual adapter are two of A and two of B.
fn rule(aggregation: Aggregation) -> Rule {
    let matrix = MatrixShape { inputs: 1, outputs: 1 };
    let rank = if aggregation == Aggregation::Ffa { 4 } else { 2 };
    let shape = AdapterShape::new(rank, aggregation.trained(), vec![matrix]).unwrap();
    Rule::new(aggregation, shape).unwrap()
}

/// A member with its own rank, and its part of the usual adapter.
fn member(client: u64, own: &[f32], rank: Option<u32>) -> Member {
    Member {
        client: ClientId(client),
        base: Digest::of_values(own),
        adapter_len: own.len() as u64,
        rank,
    }
}

fn update(own: &[f32], values: &[f32]) -> Message {
    Message::AdapterUpdate(AdapterUpdate {
        run: RunId([1; 16]),
        round: KEY.round,
        base: Digest::of_values(own),
        examples: 1,
        values: values.to_vec(),
        moments: None,
    })
}

/// A federated service with connected clients and what it is told of a round.
fn told<const MEMBERS: usize>(
    config: FederatedConfig,
    controls: Vec<Control>,
) -> (FederatedServerSession, [Peer; MEMBERS]) {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let mut federated = FederatedServerSession::new(config);
    federated.handle_control(Duration::ZERO, main.poll_control().unwrap());
    let peers = std::array::from_fn(|index| {
        let number = index as u64 + 1;
        let (_, welcome) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        let credential = Credential::Ticket(welcome.federated_ticket.unwrap());
        Peer::join(&mut federated, number, &hello(Service::Federated, credential)).0
    });
    for control in controls {
        federated.handle_control(Duration::ZERO, control);
    }
    (federated, peers)
}

fn open(members: Vec<Member>) -> Vec<Control> {
    let open = Control::OpenRound {
        round: KEY.round,
        members,
        adapter_len: 4,
        max_examples: 4,
    };
    let collect = Control::Collect {
        round: KEY.round,
        moments: None,
        copy: Vec::new(),
    };
    vec![open, collect]
}

fn closed(federated: &mut FederatedServerSession) -> Mean {
    loop {
        match federated.poll_control() {
            Some(ControlReply::RoundClosed(closed)) => return closed.average.expect("somebody was left"),
            Some(_) => {}
            None => panic!("the round is open"),
        }
    }
}

#[test]
fn a_member_of_a_smaller_rank_sends_and_gets_its_rows_and_columns() {
    let narrow = [ADAPTER[0], ADAPTER[2]];
    let base = Control::Base {
        values: ADAPTER.to_vec(),
    };
    let mut controls = vec![Control::Rule(rule(Aggregation::Mean)), base];
    controls.extend(open(vec![member(1, &ADAPTER, None), member(2, &narrow, Some(1))]));
    let (mut federated, [mut first, mut second]) = told(federated_config(), controls);
    let (mut whole, mut part) = (ADAPTER, narrow);
    whole.iter_mut().for_each(|value| *value += 1.0);
    part.iter_mut().for_each(|value| *value += 2.0);
    first.send(&mut federated, &update(&ADAPTER, &whole));
    let said = second.send(&mut federated, &update(&narrow, &part));
    let mean = closed(&mut federated);
    // Both have the first row and column; of the second column the narrow one has nothing.
    let expected = [
        (whole[0] + part[0]) / 2.0,
        whole[1],
        (whole[2] + part[1]) / 2.0,
        whole[3] / 2.0,
    ];
    assert_eq!(mean.values, expected);
    assert!(mean.exact.is_none() && mean.errors.unwrap().averaging > 0.0);
    let [Message::Average(average)] = said.messages.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!(average.values, [expected[0], expected[2]]);
    assert_eq!(average.digest, Digest::of_values(&average.values));
}

#[test]
fn ranks_and_lengths_that_do_not_go_with_the_shape_close_the_control_link() {
    let narrow = [ADAPTER[0], ADAPTER[2]];
    let whole = Control::Rule(rule(Aggregation::Mean));
    for (rule, members) in [
        (None, vec![member(1, &narrow, Some(1))]),
        (Some(&whole), vec![member(1, &narrow, Some(3))]),
        (Some(&whole), vec![member(1, &narrow, Some(0))]),
        (Some(&whole), vec![member(1, &ADAPTER[..3], Some(1))]),
        (Some(&whole), vec![member(1, &[0.0; 4], Some(1))]),
        (Some(&whole), vec![member(1, &ADAPTER[..3], None)]),
    ] {
        let control = ControlAccess::Remote {
            secret: Some(SECRET.to_owned()),
        };
        let config = FederatedConfig {
            control,
            ..federated_config()
        };
        let what = format!("{rule:?}, {members:?}");
        let (mut federated, []) = told(config, Vec::new());
        let (mut link, _) = Peer::join(&mut federated, 99, &hello(Service::Control, secret()));
        if let Some(rule) = rule {
            link.send(&mut federated, &Message::Control(rule.clone()));
        }
        let said = link.send(&mut federated, &Message::Control(open(members).remove(0)));
        assert_eq!(stop_reason(&said), Some(StopReason::Unexpected), "{what}");
    }
}

#[test]
fn two_servers_that_were_started_to_aggregate_otherwise_say_so() {
    let config = FederatedConfig {
        control: ControlAccess::Remote {
            secret: Some(SECRET.to_owned()),
        },
        aggregation: Some(Aggregation::Median),
        ..federated_config()
    };
    let mut federated = FederatedServerSession::new(config);
    let (mut link, _) = Peer::join(&mut federated, 9, &hello(Service::Control, secret()));
    let mut send = |aggregation| link.send(&mut federated, &Message::Control(Control::Rule(rule(aggregation))));
    assert_eq!(stop_reason(&send(Aggregation::Median)), None);
    let said = send(Aggregation::Flora);
    let Some(Message::Stop(stop)) = said.messages.last() else {
        panic!("{said:?}")
    };
    assert!(
        stop.detail.contains("`flora`") && stop.detail.contains("--aggregate median"),
        "{}",
        stop.detail
    );
}

/// A link of a main server to a federated server that speaks this version, once it is up.
fn linked(version: Version) -> ControlSession {
    let config = ControlConfig {
        version: PROTOCOL_VERSION,
        name: "main".to_owned(),
        secret: Some(SECRET.to_owned()),
        retries: 1,
    };
    let mut link = ControlSession::new(config, Duration::ZERO);
    let mut federated = FederatedServerSession::new(FederatedConfig {
        version,
        control: ControlAccess::Remote {
            secret: Some(SECRET.to_owned()),
        },
        ..federated_config()
    });
    assert_eq!(link.poll_event(), Some(ControlEvent::Connect));
    link.connected(Duration::ZERO);
    federated.connected(ConnectionId(1), Duration::ZERO);
    while let Some(Transmit::Frame { bytes, .. }) = link.poll_transmit() {
        federated.handle_frame(ConnectionId(1), Duration::ZERO, &bytes);
    }
    while let Some(Transmit::Frame { bytes, .. }) = federated.poll_transmit() {
        link.handle_frame(Duration::ZERO, &bytes);
    }
    assert_eq!(link.poll_event(), Some(ControlEvent::Connected));
    link
}

#[test]
fn a_federated_server_of_before_can_only_average() {
    let before = Version { major: 3, minor: 1 };
    let mut link = linked(before);
    link.send(Control::Rule(rule(Aggregation::Mean)));
    assert_eq!(
        (link.poll_transmit(), link.poll_event()),
        (None, None),
        "it is not told"
    );
    link.send(Control::Rule(rule(Aggregation::Fedex)));
    let Some(ControlEvent::Failed(failure)) = link.poll_event() else {
        panic!("it goes on")
    };
    let text = failure.to_string();
    assert!(
        text.contains("3.1") && text.contains("`fedex`") && text.contains("3.2"),
        "{text}"
    );
    let mut link = linked(AGGREGATION_SINCE);
    link.send(Control::Rule(rule(Aggregation::Fedex)));
    assert!(link.poll_transmit().is_some());
}

#[test]
fn a_client_of_before_is_refused_where_it_would_train_otherwise() {
    let before = Hello {
        version: Version { major: 3, minor: 1 },
        ..hello(Service::Main, secret())
    };
    for aggregation in Aggregation::ALL.iter().copied() {
        let mut config = main_config(1);
        config.placement.assignment.trained = aggregation.trained();
        config.placement.assignment.config.moments = aggregation.moments();
        config.placement.assignment.config.rank = rule(aggregation).shape().rank() as u32;
        config.placement.rule = Some(rule(aggregation));
        let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
        let refused = refusal(&greet(&mut main, 1, Duration::ZERO, &before));
        let expected = match aggregation {
            Aggregation::Flora | Aggregation::Ffa => Some(RefusalReason::Version),
            _ => None,
        };
        assert_eq!(refused, expected, "{aggregation}");
    }
}

#[test]
fn a_placement_whose_rule_or_ranks_are_not_its_own_is_refused() {
    let with = |change: &dyn Fn(&mut Placement)| {
        let mut config = main_config(1);
        config.placement.assignment.config.rank = 2;
        config.placement.rule = Some(rule(Aggregation::Mean));
        change(&mut config.placement);
        MainServerSession::new(config, Duration::ZERO).err()
    };
    assert_eq!(with(&|_| {}), None);
    assert_eq!(with(&|placement| placement.ranks = vec![1, 2]), None);
    let shape = Some(MainError::Shape);
    assert_eq!(with(&|placement| placement.assignment.config.rank = 4), shape);
    assert_eq!(with(&|placement| placement.rule = Some(rule(Aggregation::Ffa))), shape);
    let unknown = |placement: &mut Placement| {
        (placement.rule, placement.ranks) = (None, vec![1]);
    };
    assert_eq!(with(&unknown), shape);
    for rank in [0, 3] {
        let error = MainError::Rank { rank, most: 2 };
        assert_eq!(with(&|placement| placement.ranks = vec![2, rank]), Some(error));
    }
}

#[test]
fn every_member_has_its_rank_in_turn_at_the_scale_of_the_run() {
    let mut config = main_config(3);
    config.placement.assignment.config.rank = 2;
    config.placement.assignment.config.alpha = 8.0;
    config.placement.rule = Some(rule(Aggregation::Fedex));
    config.placement.ranks = vec![2, 1];
    let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
    let mut peers = Vec::new();
    for number in 1..=3 {
        let said = greet(&mut main, number, Duration::ZERO, &hello(Service::Main, secret()));
        let [Message::Assignment(assignment)] = said.messages.as_slice() else {
            panic!("{said:?}")
        };
        let expected = if number == 2 { (1, 4.0, 2) } else { (2, 8.0, 4) };
        let found = &assignment.config;
        assert_eq!((found.rank, found.alpha, assignment.adapter_len), expected);
        peers.push(number);
    }
}

/// A main server that has closed the steps of a round with one member, and awaits the average.
fn awaiting(aggregation: Aggregation) -> MainServerSession {
    let mut config = main_config(1);
    config.placement.assignment.config.rank = 2;
    config.placement.assignment.config.local_steps = 1;
    config.placement.rule = Some(rule(aggregation));
    let mut main = MainServerSession::new(config, Duration::ZERO).unwrap();
    let (mut peer, _) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    let ready = Ready {
        assignment: 0,
        speed: None,
    };
    peer.send(&mut main, &Message::Ready(ready));
    peer.send(&mut main, &Message::Activations(good_activations()));
    let contributed = events(&mut main).into_iter().find_map(|event| match event {
        MainEvent::Contribution { key, contribution } => Some((key, contribution)),
        _ => None,
    });
    let (key, contribution) = contributed.expect("the activations are handed on");
    let output = GradientOutput {
        client: contribution.client,
        loss: 1.0,
        gradient: contribution.activations.clone(),
    };
    main.contributed(Duration::ZERO, key, contribution.client, Some(output))
        .unwrap();
    let done = StepDone {
        key,
        backward: Duration::ZERO,
    };
    peer.send(&mut main, &Message::StepDone(done));
    events(&mut main);
    let rules = std::iter::from_fn(|| main.poll_control()).filter(|control| matches!(control, Control::Rule(_)));
    assert_eq!(rules.count(), 1, "told once");
    main
}

fn answer(main: &mut MainServerSession, exact: Option<Exact>, errors: Option<Errors>) -> Vec<MainEvent> {
    let closed = RoundClosed {
        round: KEY.round,
        included: vec![Inclusion {
            client: ClientId(1),
            examples: 2,
        }],
        excluded: Vec::new(),
        average: Some(Mean {
            digest: Digest::of_values(&ADAPTER),
            values: ADAPTER.to_vec(),
            moments: None,
            exact: exact.map(Box::new),
            errors,
        }),
    };
    main.handle_control(Duration::ZERO, ControlReply::RoundClosed(closed));
    events(main)
}

#[test]
fn exact_products_are_handed_on_or_are_the_federated_servers_fault() {
    let exact = |value: f32| Exact {
        ranks: vec![1],
        values: vec![value, 1.0],
    };
    let product: f32 = ADAPTER[0] * ADAPTER[2] + ADAPTER[1] * ADAPTER[3];
    let errors = Errors {
        averaging: 0.5,
        start: 0.25,
    };
    let found = answer(&mut awaiting(Aggregation::Fedex), Some(exact(product)), Some(errors));
    let handed = found.iter().find_map(|event| match event {
        MainEvent::RoundClosed { exact, errors, .. } => Some((exact.clone(), *errors)),
        _ => None,
    });
    assert_eq!(handed, Some((Some(exact(product)), Some(errors))), "{found:?}");

    let ends = |found: &[MainEvent]| {
        found.iter().any(|event| {
            let MainEvent::Finished { reason } = event else {
                return false;
            };
            matches!(reason, RunEnd::FederatedFault(_))
        })
    };
    let two = Exact {
        ranks: vec![2],
        values: vec![1.0; 4],
    };
    for wrong in [exact(f32::NAN), two, Exact::default()] {
        assert!(
            ends(&answer(&mut awaiting(Aggregation::Fedex), Some(wrong.clone()), None)),
            "{wrong:?}"
        );
    }
    let nonsense = Errors {
        averaging: f64::NAN,
        start: 0.0,
    };
    assert!(ends(&answer(&mut awaiting(Aggregation::Mean), None, Some(nonsense))));
    // What no training can have led to is no fault of the federated server's: the round is begun again.
    let found = answer(&mut awaiting(Aggregation::Fedex), Some(exact(1e9)), None);
    assert!(
        found
            .iter()
            .any(|event| matches!(event, MainEvent::RoundRejected { .. })),
        "{found:?}"
    );
}

#[test]
fn in_any_weather_every_round_comes_to_what_its_rule_says() {
    for aggregation in Aggregation::ALL.iter().copied() {
        for seed in 0..12 {
            let scenario = Scenario {
                seed,
                aggregation,
                weather: if seed % 2 == 0 { Weather::CALM } else { Weather::STORM },
                remote_control: seed % 3 == 0,
                splits: if seed % 4 == 1 { vec![1, 3, 2] } else { Vec::new() },
                ..Scenario::calm(4, 4, 2)
            };
            let outcome = simulate(&scenario);
            assert_sound(&outcome, &scenario);
            assert_eq!(
                (outcome.end.as_ref(), outcome.rounds.len()),
                (Some(&RunEnd::Completed), 4),
                "{aggregation}"
            );
            assert_eq!(outcome, simulate(&scenario), "a function of its scenario");
        }
    }
    let moments = Aggregation::ALL
        .iter()
        .filter(|one| one.moments() == MomentPolicy::Reset);
    assert_eq!(moments.count(), 1);
}
