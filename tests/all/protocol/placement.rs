//! Plans and placements as the driver gives them: who holds what, and who is waited for.

use std::collections::BTreeMap;
use std::time::Duration;

use sflllm::protocol::codec::{Frame, decode_frame, decode_message};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::terms::ids::{ClientId, RunId};
use sflllm::terms::moments::Moments;

use super::peer::*;

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
        rule: None,
        ranks: Vec::new(),
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
