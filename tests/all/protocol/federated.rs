//! The federated service, frame by frame: what is averaged, and what is left out.

use std::collections::BTreeMap;
use std::time::Duration;

use sflllm::protocol::codec::{Frame, decode_frame, decode_message};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::terms::ids::{ClientId, RoundKey, RunId};
use sflllm::terms::moments::Moments;

use super::peer::*;

/// A member with the whole adapter.
fn member(client: u64) -> Member {
    Member {
        client: ClientId(client),
        base: Digest::of_values(&ADAPTER),
        adapter_len: 4,
        rank: None,
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
            exact: None,
            errors: None,
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
                rank: None,
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

/// A federated service whose main server is elsewhere and speaks this version, with an open round of members who have been asked for
/// their adapters.
fn collecting_for<const MEMBERS: usize>(version: Version) -> (FederatedServerSession, Peer, [Peer; MEMBERS]) {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let mut federated = FederatedServerSession::new(FederatedConfig {
        control: ControlAccess::Remote {
            secret: Some(SECRET.to_owned()),
        },
        ..federated_config()
    });
    let greeting = Hello {
        version,
        ..hello(Service::Control, secret())
    };
    let (mut link, _) = Peer::join(&mut federated, 99, &greeting);
    let open_run = main.poll_control().unwrap();
    link.send(&mut federated, &Message::Control(open_run));
    let peers = std::array::from_fn(|index| {
        let number = index as u64 + 1;
        let (_, welcome) = Peer::join(&mut main, number, &hello(Service::Main, secret()));
        let credential = Credential::Ticket(welcome.federated_ticket.unwrap());
        Peer::join(&mut federated, number, &hello(Service::Federated, credential)).0
    });
    let values = ADAPTER.to_vec();
    link.send(&mut federated, &Message::Control(Control::Base { values }));
    open(&mut federated, KEY.round, MEMBERS);
    (federated, link, peers)
}

/// Opens a round from the usual adapter with so many members, and asks them for their adapters.
fn open(federated: &mut FederatedServerSession, round: RoundKey, members: usize) {
    let open = Control::OpenRound {
        round,
        members: (1..=members as u64).map(member).collect(),
        adapter_len: 4,
        max_examples: 4,
    };
    federated.handle_control(Duration::ZERO, open);
    let collect = Control::Collect {
        round,
        moments: None,
        copy: Vec::new(),
    };
    federated.handle_control(Duration::ZERO, collect);
}

/// What was said over the link of a main server elsewhere.
fn linked(federated: &mut FederatedServerSession, link: &Peer) -> Vec<ControlReply> {
    let said = listen(federated, link.connection);
    let replies = said.messages.into_iter().filter_map(|message| match message {
        Message::ControlReply(ControlReply::Received { .. }) => None,
        Message::ControlReply(reply) => Some(reply),
        _ => None,
    });
    replies.collect()
}

/// The word of a main server elsewhere may be later than a client's.
#[test]
fn an_adapter_that_overtakes_the_opening_of_its_round_is_in_the_average() {
    let (mut federated, link, [mut first, _]) = collecting_for(PROTOCOL_VERSION);
    let round = RoundKey { round: 0, attempt: 1 };
    let early = AdapterUpdate {
        round,
        ..update([1.0; 4], 1)
    };
    let said = first.send(&mut federated, &Message::AdapterUpdate(early));
    assert_eq!((said.messages.as_slice(), said.closed), ([].as_slice(), false));
    open(&mut federated, round, 1);
    let said = linked(&mut federated, &link);
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
}

/// In one process nobody hears of a round before the federated server does.
#[test]
fn an_adapter_for_a_round_that_nobody_has_begun_ends_its_senders_session_and_the_round_goes_on() {
    let (mut federated, [mut honest, mut liar]) = collecting();
    let future = AdapterUpdate {
        round: RoundKey { round: 7, attempt: 0 },
        ..update(ADAPTER, 1)
    };
    let said = liar.send(&mut federated, &Message::AdapterUpdate(future));
    assert_eq!(stop_reason(&said), Some(StopReason::BadUpdate));
    honest.send(&mut federated, &Message::AdapterUpdate(update(ADAPTER, 1)));
    let said = replies(&mut federated);
    let [ControlReply::Excluded { .. }, ControlReply::RoundClosed(closed)] = said.as_slice() else {
        panic!("{said:?}")
    };
    assert_eq!(closed.included.len(), 1);
    assert_eq!(closed.excluded[0].client, ClientId(2));
}

#[test]
fn who_was_thrown_out_does_not_come_in_again_by_its_ticket() {
    let mut main = MainServerSession::new(main_config(9), Duration::ZERO).unwrap();
    let mut federated = FederatedServerSession::new(federated_config());
    while let Some(control) = main.poll_control() {
        federated.handle_control(Duration::ZERO, control);
    }
    let (_, welcome) = Peer::join(&mut main, 1, &hello(Service::Main, secret()));
    let credential = Credential::Ticket(welcome.federated_ticket.unwrap());
    let (mut liar, welcome) = Peer::join(&mut federated, 1, &hello(Service::Federated, credential));
    let said = liar.send(&mut federated, &READY);
    assert_eq!(stop_reason(&said), Some(StopReason::Unexpected));
    let again = hello(Service::Federated, Credential::Ticket(welcome.ticket));
    let said = greet(&mut federated, 2, Duration::ZERO, &again);
    assert_eq!(refusal(&said), Some(RefusalReason::Expelled));
}

/// An adapter that has moved by this much in every value.
fn moved(by: f32) -> [f32; 4] {
    ADAPTER.map(|value| value + by)
}

/// A local federated service with what rounds start from.
fn comparing<const MEMBERS: usize>() -> (FederatedServerSession, [Peer; MEMBERS]) {
    let (mut federated, peers) = collecting_from(None);
    let values = ADAPTER.to_vec();
    federated.handle_control(Duration::ZERO, Control::Base { values });
    (federated, peers)
}

/// Who is in a round, who is not and why, and its average.
type Closed = (Vec<u64>, Vec<(u64, ExclusionReason)>, Option<Vec<f32>>);

/// Every member's adapter, and what the round comes to.
fn close<const MEMBERS: usize>(
    federated: &mut FederatedServerSession,
    peers: &mut [Peer; MEMBERS],
    round: RoundKey,
    by: [f32; MEMBERS],
) -> Closed {
    for (peer, by) in peers.iter_mut().zip(by) {
        let update = AdapterUpdate {
            round,
            ..update(moved(by), 1)
        };
        peer.send(federated, &Message::AdapterUpdate(update));
    }
    let said = replies(federated);
    let Some(ControlReply::RoundClosed(closed)) = said.last() else {
        panic!("{said:?}")
    };
    let excluded = closed
        .excluded
        .iter()
        .map(|exclusion| (exclusion.client.0, exclusion.reason));
    (
        closed.included.iter().map(|included| included.client.0).collect(),
        excluded.collect(),
        closed.average.as_ref().map(|average| average.values.clone()),
    )
}

#[test]
fn an_adapter_that_has_moved_ten_times_as_far_as_the_others_is_left_out_and_named() {
    use ExclusionReason::Outlier;
    for (by, liars) in [
        ([0.01, 0.02, 0.01], vec![]),
        ([0.01, 0.05, -0.09], vec![]),
        ([0.01, 0.01, 0.2], vec![3]),
        ([-1.0, 0.01, 0.02], vec![1]),
        ([0.01, 1e38, 0.01], vec![2]),
        // Who has not moved is no measure for the others, and no outlier.
        ([0.0, 0.0, 0.01], vec![]),
    ] {
        let (mut federated, mut peers) = comparing::<3>();
        let (included, excluded, average) = close(&mut federated, &mut peers, KEY.round, by);
        let expected: Vec<(u64, ExclusionReason)> = liars.iter().map(|liar| (*liar, Outlier)).collect();
        assert_eq!(excluded, expected, "{by:?}");
        assert_eq!(included.len(), 3 - liars.len());
        let honest = (1..).zip(by).filter(|(client, _)| !liars.contains(client));
        let honest: Vec<(u64, [f32; 4])> = honest.map(|(_, by)| (1, moved(by))).collect();
        let honest: Vec<(u64, &[f32])> = honest.iter().map(|(weight, values)| (*weight, &values[..])).collect();
        assert_eq!(average, sflllm::federated::weighted_mean(&honest).ok(), "{by:?}");
    }
    // Half of them are liars: who has moved least is the measure.
    let (mut federated, mut peers) = comparing::<4>();
    let (included, ..) = close(&mut federated, &mut peers, KEY.round, [0.01, 9.0, 0.02, 9.0]);
    assert_eq!(included, [1, 3]);
}

#[test]
fn with_two_members_the_rounds_before_are_the_measure() {
    let (mut federated, mut peers) = comparing::<2>();
    let (included, ..) = close(&mut federated, &mut peers, KEY.round, [0.01, 0.02]);
    assert_eq!(included, [1, 2]);
    let next = RoundKey { round: 1, attempt: 0 };
    let values = ADAPTER.to_vec();
    federated.handle_control(Duration::ZERO, Control::Base { values });
    open(&mut federated, next, 2);
    let (included, excluded, _) = close(&mut federated, &mut peers, next, [0.02, 0.3]);
    assert_eq!((included, excluded), (vec![1], vec![(2, ExclusionReason::Outlier)]));
}

/// Nobody knows in the first round of two which of them is right. The main server does, when it has tried the average.
#[test]
fn a_round_of_two_that_the_main_server_begins_again_goes_on_without_who_has_moved_much_further() {
    let (mut federated, mut peers) = comparing::<2>();
    let (included, ..) = close(&mut federated, &mut peers, KEY.round, [0.01, 1e38]);
    assert_eq!(included, [1, 2]);
    let again = RoundKey { round: 0, attempt: 1 };
    let values = ADAPTER.to_vec();
    federated.handle_control(Duration::ZERO, Control::Base { values });
    open(&mut federated, again, 2);
    let (included, excluded, average) = close(&mut federated, &mut peers, again, [0.01, 1e38]);
    assert_eq!((included, excluded), (vec![1], vec![(2, ExclusionReason::Outlier)]));
    assert_eq!(average, Some(moved(0.01).to_vec()));
    // What was of no use is not what is usual.
    let next = RoundKey { round: 1, attempt: 0 };
    let values = ADAPTER.to_vec();
    federated.handle_control(Duration::ZERO, Control::Base { values });
    open(&mut federated, next, 1);
    let mut peers = [peers.into_iter().next().unwrap()];
    let (included, excluded, _) = close(&mut federated, &mut peers, next, [1.0]);
    assert_eq!((included, excluded), (vec![], vec![(1, ExclusionReason::Outlier)]));
}

#[test]
fn a_main_server_before_outliers_is_told_in_words_it_knows() {
    let old = Version { major: 3, minor: 1 };
    for (version, reason) in [
        (PROTOCOL_VERSION, ExclusionReason::Outlier),
        (old, ExclusionReason::Misbehaved),
    ] {
        let (mut federated, link, mut peers) = collecting_for::<3>(version);
        let mut said = Vec::new();
        for (peer, by) in peers.iter_mut().zip([0.01, 0.01, 5.0]) {
            let update = Message::AdapterUpdate(update(moved(by), 1));
            let (kind, body) = sflllm::protocol::codec::encode_message(&update);
            let frame = Frame::Message {
                number: 0,
                acknowledged: peer.received,
                kind,
                body: &body,
            };
            let bytes = sflllm::protocol::codec::encode_frame(frame);
            federated.handle_frame(peer.connection, Duration::ZERO, &bytes);
            said.extend(linked(&mut federated, &link));
        }
        let [ControlReply::RoundClosed(closed)] = said.as_slice() else {
            panic!("{said:?}")
        };
        assert_eq!(closed.excluded[0].reason, reason);
    }
}
