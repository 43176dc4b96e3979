//! A client against a main server that does not keep to the protocol.

use std::time::Duration;

use sflllm::protocol::codec::{
    Answer, Frame, decode_frame, decode_message, encode_answer, encode_checked_frame, encode_frame, encode_message,
};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use sflllm::terms::moments::Moments;
use sflllm::terms::speed::Speed;

use super::peer::*;

/// A main server's side of one connection, in the test's hands.
struct Puppet {
    client: ClientSession,
    sent: u32,
}

impl Puppet {
    /// A client that has loaded its first assignment.
    fn ready() -> Puppet {
        let mut client = ClientSession::new(client_config(), Duration::ZERO);
        let mut puppet = {
            client.connected(Endpoint::Main, Duration::ZERO);
            Puppet { client, sent: 0 }
        };
        puppet.answer(Endpoint::Main);
        puppet.client.connected(Endpoint::Federated, Duration::ZERO);
        puppet.answer(Endpoint::Federated);
        puppet.send(&Message::Assignment(Box::new(assignment(RunId([1; 16])))));
        puppet.client.ready(Duration::ZERO, None);
        puppet
    }

    /// A client in the middle of step 0, which has sent its activations.
    fn awaiting_gradient() -> Puppet {
        let mut puppet = Puppet::ready();
        let base = Digest::of_values(&ADAPTER);
        let adapter = Some(ADAPTER.to_vec());
        puppet.send(&Message::RoundStart(RoundStart {
            round: KEY.round,
            base,
            members: 1,
            adapter,
            moments: None,
            rates: None,
        }));
        puppet.send(&Message::StepStart(StepStart { key: KEY, members: 1 }));
        let asked = puppet.events();
        assert!(asked.contains(&ClientEvent::ComputeForward { key: KEY }), "{asked:?}");
        let input = ActivationsInput {
            key: KEY,
            examples: 1,
            forward: Duration::ZERO,
            targets: vec![1, 2],
            tensor: tensor(1, 2, 2, vec![3; 16]),
        };
        puppet.client.activations(Duration::ZERO, input).unwrap();
        puppet
    }

    /// A client that has done both steps of round 0.
    fn awaiting_end() -> Puppet {
        let mut puppet = Puppet::awaiting_gradient();
        puppet.send(&Message::Gradient(good_gradient()));
        let next = StepKey { step: 1, ..KEY };
        puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
        puppet.send(&Message::StepStart(StepStart { key: next, members: 1 }));
        let input = ActivationsInput {
            key: next,
            examples: 1,
            forward: Duration::ZERO,
            targets: vec![1, 2],
            tensor: tensor(1, 2, 2, vec![3; 16]),
        };
        puppet.client.activations(Duration::ZERO, input).unwrap();
        puppet.send(&Message::Gradient(Gradient {
            key: next,
            ..good_gradient()
        }));
        puppet.client.step_done(Duration::ZERO, next, Duration::ZERO);
        puppet.events();
        puppet
    }

    fn answer(&mut self, endpoint: Endpoint) {
        let ticket = Ticket(vec![1]);
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            client: ClientId(1),
            run: RunId([1; 16]),
            ticket: ticket.clone(),
            federated_ticket: (endpoint == Endpoint::Main).then_some(ticket),
            federated_url: None,
            ping_interval: PING_INTERVAL,
            model: Digest::of(b"model"),
            tokenizer: Digest::of(b"tokenizer"),
        };
        let bytes = encode_answer(&Answer::Welcome(welcome));
        self.client.handle_frame(endpoint, Duration::ZERO, &bytes);
    }

    fn send(&mut self, message: &Message) {
        let (kind, body) = encode_message(message);
        self.send_body(kind, &body);
    }

    fn send_body(&mut self, kind: u8, body: &[u8]) {
        let frame = Frame::Message {
            number: self.sent,
            acknowledged: 0,
            kind,
            body,
        };
        self.sent += 1;
        self.client
            .handle_frame(Endpoint::Main, Duration::ZERO, &encode_frame(frame));
    }

    fn events(&mut self) -> Vec<ClientEvent> {
        std::iter::from_fn(|| self.client.poll_event()).collect()
    }
}

fn good_gradient() -> Gradient {
    Gradient {
        key: KEY,
        activations: Digest::of(&[3; 16]),
        loss: 1.0,
        tokens: 2,
        mean_loss: 1.0,
        tensor: zeros(1, 2, 2),
    }
}

#[test]
fn a_gradient_damaged_on_the_way_is_not_applied_and_another_connection_is_asked_for() {
    let mut puppet = Puppet::awaiting_gradient();
    let good = encode_checked_frame(puppet.sent, 0, &Message::Gradient(good_gradient()));
    let mut damaged = good.clone();
    // A low bit of the tensor's last number, before the kind and the digest.
    let at = good.len() - 1 - 32 - 4;
    damaged[at] ^= 1;
    puppet.client.handle_frame(Endpoint::Main, Duration::ZERO, &damaged);
    let events = puppet.events();
    assert!(
        matches!(
            events.as_slice(),
            [ClientEvent::ConnectionLost {
                endpoint: Endpoint::Main,
                ..
            }]
        ),
        "{events:?}"
    );

    let mut puppet = Puppet::awaiting_gradient();
    puppet.client.handle_frame(Endpoint::Main, Duration::ZERO, &good);
    assert!(matches!(
        puppet.events().as_slice(),
        [ClientEvent::ComputeBackward { .. }]
    ));
}

#[test]
fn a_gradient_is_applied_only_to_the_activations_it_belongs_to() {
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&Message::Gradient(good_gradient()));
    assert_eq!(
        puppet.events(),
        [ClientEvent::ComputeBackward {
            key: KEY,
            gradient: good_gradient()
        }]
    );

    let good = good_gradient;
    let other = StepKey {
        round: RoundKey { round: 0, attempt: 1 },
        step: 0,
    };
    for bad in [
        Gradient {
            key: StepKey { step: 1, ..KEY },
            ..good()
        },
        Gradient { key: other, ..good() },
        Gradient {
            activations: Digest::of(&[4; 16]),
            ..good()
        },
        Gradient {
            tensor: zeros(2, 1, 2),
            ..good()
        },
        Gradient {
            tensor: zeros(1, 2, 1),
            ..good()
        },
        Gradient {
            tensor: halves(1, 2, 2),
            ..good()
        },
        Gradient {
            tensor: tensor(1, 2, 2, f32::NAN.to_le_bytes().repeat(4)),
            ..good()
        },
    ] {
        let mut puppet = Puppet::awaiting_gradient();
        puppet.send(&Message::Gradient(bad.clone()));
        let events = puppet.events();
        assert!(
            matches!(events.as_slice(), [ClientEvent::Failed(ClientFailure::Protocol { .. })]),
            "{bad:?}: {events:?}"
        );
    }
    for (layout, bytes) in [([1, 2, 2], 12), ([1, 2, 1], 16), ([u32::MAX; 3], 16)] {
        let mut puppet = Puppet::awaiting_gradient();
        // Behind the key.
        let (kind, body) = misfit(&Message::Gradient(good()), (12, 16), layout, bytes);
        puppet.send_body(kind, &body);
        let events = puppet.events();
        assert!(
            matches!(
                events.as_slice(),
                [ClientEvent::Failed(ClientFailure::Connection { .. })]
            ),
            "{layout:?}: {events:?}"
        );
    }
}

#[test]
fn a_second_gradient_for_the_same_step_is_never_applied() {
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&Message::Gradient(good_gradient()));
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    puppet.events();
    puppet.send(&Message::Gradient(good_gradient()));
    let events = puppet.events();
    assert!(
        matches!(events.as_slice(), [ClientEvent::Failed(ClientFailure::Protocol { .. })]),
        "{events:?}"
    );
}

#[test]
fn an_adapter_that_is_not_what_its_digest_says_is_not_installed() {
    let base = Digest::of_values(&ADAPTER);
    for (base, adapter) in [
        (base, Some(vec![1.0; 4])),
        (Digest::of_values(&[1.0; 3]), Some(vec![1.0; 3])),
        (Digest::of_values(&[f32::NAN; 4]), Some(vec![f32::NAN; 4])),
        (base, None),
    ] {
        let mut puppet = Puppet::ready();
        puppet.events();
        puppet.send(&Message::RoundStart(RoundStart {
            round: KEY.round,
            base,
            members: 1,
            adapter,
            moments: None,
            rates: None,
        }));
        let events = puppet.events();
        assert!(
            matches!(events.as_slice(), [ClientEvent::Failed(ClientFailure::Protocol { .. })]),
            "{events:?}"
        );
    }
}

/// What a client that fails says.
fn failure(puppet: &mut Puppet) -> String {
    match puppet.events().pop() {
        Some(ClientEvent::Failed(failure @ ClientFailure::Protocol { .. })) => failure.to_string(),
        other => panic!("expected a failure, got {other:?}"),
    }
}

#[test]
fn another_assignment_is_loaded_once_and_ends_the_round_for_this_client() {
    let reassign = |assignment: Assignment| Message::Assignment(Box::new(assignment));
    let mut puppet = Puppet::ready();
    puppet.events();
    puppet.send(&reassign(reassignment()));
    assert_eq!(puppet.events(), [ClientEvent::Assigned(Box::new(reassignment()))]);
    while puppet.client.poll_transmit().is_some() {}
    puppet.client.ready(Duration::ZERO, Speed::new(2.0, 3.0));
    let Some(Transmit::Frame { bytes, .. }) = puppet.client.poll_transmit() else {
        panic!("nothing said")
    };
    let Ok(Frame::Message { kind, body, .. }) = decode_frame(&bytes) else {
        panic!("no message")
    };
    let ready = Message::Ready(Ready {
        assignment: 1,
        speed: Speed::new(2.0, 3.0),
    });
    assert_eq!(decode_message(kind, body), Ok(ready));

    // Not twice, not out of order, and of no impossible size.
    let again = Assignment {
        number: 1,
        config: assignment(RunId([1; 16])).config,
        ..reassignment()
    };
    puppet.send(&reassign(again));
    assert!(failure(&mut puppet).contains("got Assignment 1"));
    let mut puppet = Puppet::ready();
    puppet.send(&reassign(Assignment {
        number: 0,
        ..reassignment()
    }));
    assert!(failure(&mut puppet).contains("got Assignment 0"));
    // In the middle of a round it says that the round goes on without this client.
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&reassign(reassignment()));
    assert_eq!(puppet.events(), [ClientEvent::Assigned(Box::new(reassignment()))]);
    puppet.send(&Message::Gradient(good_gradient()));
    assert!(failure(&mut puppet).contains("got Gradient"));
    let mut puppet = Puppet::ready();
    puppet.send(&reassign(Assignment {
        adapter_len: u64::MAX / 2,
        ..reassignment()
    }));
    assert!(failure(&mut puppet).contains("too large"));
}

#[test]
fn a_round_does_not_start_before_the_latest_assignment_is_loaded() {
    let mut puppet = Puppet::ready();
    puppet.send(&Message::Assignment(Box::new(reassignment())));
    puppet.events();
    puppet.send(&Message::RoundStart(round_start(vec![0.5; 8], None)));
    assert!(failure(&mut puppet).contains("got RoundStart"));
}

fn round_start(adapter: Vec<f32>, moments: Option<Moments>) -> RoundStart {
    RoundStart {
        round: KEY.round,
        base: Digest::of_values(&adapter),
        members: 1,
        adapter: Some(adapter),
        moments,
        rates: None,
    }
}

#[test]
fn moments_are_those_of_an_adapters_last_blocks_or_end_the_session() {
    let of = |len: usize, value: f32| Moments {
        steps: 3,
        first: vec![value; len],
        second: vec![value; len],
    };
    let two_blocks = || {
        let mut puppet = Puppet::ready();
        puppet.send(&Message::Assignment(Box::new(reassignment())));
        puppet.client.ready(Duration::ZERO, None);
        puppet.events();
        puppet
    };
    let mut puppet = two_blocks();
    puppet.send(&Message::RoundStart(round_start(vec![0.5; 8], Some(of(4, 1.0)))));
    let said = puppet.events();
    assert!(
        matches!(&said[0], ClientEvent::InstallAdapter { moments: Some(moments), .. } if *moments == of(4, 1.0)),
        "{said:?}"
    );
    let uneven = Moments {
        second: vec![1.0; 3],
        ..of(4, 1.0)
    };
    for bad in [
        of(3, 1.0),
        of(8, 1.0),
        of(12, 1.0),
        of(4, f32::NAN),
        of(4, -1.0),
        uneven,
    ] {
        let mut puppet = two_blocks();
        puppet.send(&Message::RoundStart(round_start(vec![0.5; 8], Some(bad))));
        assert!(failure(&mut puppet).contains("last blocks"));
    }
    let mut puppet = two_blocks();
    puppet.send(&Message::RoundStart(RoundStart {
        adapter: None,
        ..round_start(vec![0.5; 8], Some(of(4, 1.0)))
    }));
    assert!(failure(&mut puppet).contains("without the adapter"));
}

#[test]
fn an_adapter_is_asked_for_after_the_last_step_and_with_sense() {
    let end = |split, steps| {
        Message::RoundEnd(RoundEnd {
            round: KEY.round,
            split,
            steps,
        })
    };
    let mut puppet = Puppet::ready();
    puppet.send(&end(1, 2));
    assert!(failure(&mut puppet).contains("got RoundEnd"));
    let mut puppet = Puppet::awaiting_end();
    puppet.send(&Message::RoundEnd(RoundEnd {
        round: RoundKey { round: 1, attempt: 0 },
        split: 1,
        steps: 2,
    }));
    assert!(failure(&mut puppet).contains("got RoundEnd"));
    for (split, steps) in [(0, 2), (1, 0)] {
        let mut puppet = Puppet::awaiting_end();
        puppet.send(&end(split, steps));
        assert!(failure(&mut puppet).contains("RoundEnd"));
    }
    let mut puppet = Puppet::awaiting_end();
    puppet.send(&end(1, 2));
    let asked = ClientEvent::UploadAdapter {
        round: KEY.round,
        split: 1,
        steps: 2,
    };
    assert_eq!(puppet.events(), [asked]);
    let input = AdapterInput {
        round: KEY.round,
        examples: 1,
        values: ADAPTER.to_vec(),
        moments: Some(Moments {
            steps: 2,
            first: vec![0.0; 4],
            second: vec![0.0; 4],
        }),
    };
    assert_eq!(
        puppet.client.adapter(Duration::ZERO, input.clone()),
        Err(ClientError::Moments),
        "no block leaves"
    );
    let without = AdapterInput { moments: None, ..input };
    assert_eq!(
        puppet.client.adapter(Duration::ZERO, without),
        Ok(()),
        "the request stands"
    );
}

/// What the client has sent since it was last asked.
fn sent(puppet: &mut Puppet) -> Vec<Message> {
    let frames = std::iter::from_fn(|| puppet.client.poll_transmit());
    frames
        .filter_map(|transmit| match transmit {
            Transmit::Frame { bytes, .. } if !sflllm::protocol::codec::is_greeting(&bytes) => {
                match decode_frame(&bytes).unwrap() {
                    Frame::Message { kind, body, .. } => Some(decode_message(kind, body).unwrap()),
                    _ => None,
                }
            }
            _ => None,
        })
        .collect()
}

fn step_start(step: u32) -> Message {
    Message::StepStart(StepStart {
        key: StepKey { step, ..KEY },
        members: 2,
    })
}

#[test]
fn a_client_that_was_too_late_for_a_step_goes_on_with_the_next() {
    let next = StepKey { step: 1, ..KEY };
    let input = ActivationsInput {
        key: KEY,
        examples: 1,
        forward: Duration::ZERO,
        targets: vec![1, 2],
        tensor: tensor(1, 2, 2, vec![3; 16]),
    };
    // Its activations were on their way.
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&step_start(1));
    assert_eq!(puppet.events(), [ClientEvent::ComputeForward { key: next }]);
    // They are not yet computed: what comes of that is dropped.
    let mut puppet = Puppet::ready();
    let base = Digest::of_values(&ADAPTER);
    puppet.send(&Message::RoundStart(RoundStart {
        base,
        ..round_start(ADAPTER.to_vec(), None)
    }));
    puppet.send(&step_start(0));
    puppet.events();
    puppet.send(&step_start(1));
    assert_eq!(puppet.events(), [ClientEvent::ComputeForward { key: next }]);
    sent(&mut puppet);
    puppet.client.activations(Duration::ZERO, input.clone()).unwrap();
    assert_eq!(sent(&mut puppet), []);
    let fits = ActivationsInput { key: next, ..input };
    puppet.client.activations(Duration::ZERO, fits).unwrap();
    assert!(matches!(sent(&mut puppet).as_slice(), [Message::Activations(given)] if given.key == next));
    // Not back again, and not past the round's last.
    for step in [0, 1, 2] {
        let mut puppet = Puppet::awaiting_gradient();
        puppet.send(&step_start(1));
        puppet.events();
        puppet.send(&step_start(step));
        assert!(failure(&mut puppet).contains("got StepStart"), "{step}");
    }
}

#[test]
fn a_client_that_is_busy_with_a_gradient_finishes_it_before_it_goes_on() {
    let mut puppet = Puppet::awaiting_gradient();
    puppet.send(&Message::Gradient(good_gradient()));
    puppet.send(&step_start(1));
    let end = RoundEnd {
        round: KEY.round,
        split: 1,
        steps: 2,
    };
    puppet.send(&Message::RoundEnd(end));
    assert!(matches!(
        puppet.events().as_slice(),
        [ClientEvent::ComputeBackward { .. }]
    ));
    sent(&mut puppet);
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    assert!(matches!(sent(&mut puppet).as_slice(), [Message::StepDone(done)] if done.key == KEY));
    let asked = ClientEvent::UploadAdapter {
        round: KEY.round,
        split: 1,
        steps: 2,
    };
    assert_eq!(puppet.events(), [asked], "the last step went on without it");
}

#[test]
fn a_client_that_was_too_late_for_a_round_begins_the_next() {
    let again = |attempt, adapter: Option<Vec<f32>>| {
        Message::RoundStart(RoundStart {
            round: RoundKey { round: 0, attempt },
            adapter,
            ..round_start(ADAPTER.to_vec(), None)
        })
    };
    let states: [fn() -> Puppet; 3] = [Puppet::awaiting_gradient, Puppet::awaiting_end, || {
        let mut puppet = Puppet::awaiting_gradient();
        puppet.send(&Message::Gradient(good_gradient()));
        puppet
    }];
    for state in states {
        let mut puppet = state();
        puppet.events();
        puppet.send(&again(1, Some(ADAPTER.to_vec())));
        let found = puppet.events();
        assert!(
            matches!(
                found.as_slice(),
                [ClientEvent::InstallAdapter { .. }, ClientEvent::RoundStarted { .. }]
            ),
            "{found:?}"
        );
        puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
        let key = RoundKey { round: 0, attempt: 1 }.step(0);
        puppet.send(&Message::StepStart(StepStart { key, members: 1 }));
        assert_eq!(puppet.events(), [ClientEvent::ComputeForward { key }]);

        let mut puppet = state();
        puppet.events();
        puppet.send(&again(0, Some(ADAPTER.to_vec())));
        assert!(
            failure(&mut puppet).contains("got RoundStart"),
            "the same round is none"
        );
    }
}

#[test]
fn answers_to_superseded_requests_are_dropped_and_wrong_shapes_are_the_drivers_error() {
    let mut puppet = Puppet::awaiting_gradient();
    let stale = ActivationsInput {
        key: KEY,
        examples: 1,
        forward: Duration::ZERO,
        targets: vec![1],
        tensor: zeros(1, 1, 2),
    };
    while puppet.client.poll_transmit().is_some() {}
    assert_eq!(puppet.client.activations(Duration::ZERO, stale.clone()), Ok(()));
    let unasked = AdapterInput {
        round: KEY.round,
        examples: 1,
        values: Vec::new(),
        moments: None,
    };
    assert_eq!(puppet.client.adapter(Duration::ZERO, unasked), Ok(()));
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    assert_eq!(puppet.client.poll_transmit(), None, "nothing is sent twice");

    puppet.send(&Message::Gradient(good_gradient()));
    let next = StepKey { step: 1, ..KEY };
    puppet.send(&Message::StepStart(StepStart { key: next, members: 1 }));
    puppet.client.step_done(Duration::ZERO, KEY, Duration::ZERO);
    let fits = ActivationsInput { key: next, ..stale };
    let wide = ActivationsInput {
        tensor: zeros(3, 1, 2),
        ..fits.clone()
    };
    assert!(matches!(
        puppet.client.activations(Duration::ZERO, wide),
        Err(ClientError::Layout { .. })
    ));
    let short = ActivationsInput {
        targets: Vec::new(),
        ..fits.clone()
    };
    assert!(matches!(
        puppet.client.activations(Duration::ZERO, short),
        Err(ClientError::Targets { .. })
    ));
    assert_eq!(
        puppet.client.activations(Duration::ZERO, fits),
        Ok(()),
        "the request stands"
    );
}
