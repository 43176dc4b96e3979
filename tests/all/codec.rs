//! Bytes to messages and back: whatever is encoded is decoded to the same, and whatever comes in is refused or understood
//! in memory that its length bounds.

use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use sflllm::federated::{Errors, Exact, Rule};
use sflllm::protocol::codec::{
    Answer, DecodeError, Frame, GreetingError, decode_answer, decode_frame, decode_hello, decode_message,
    encode_answer, encode_checked_frame, encode_frame, encode_hello, encode_message, encode_message_frame,
};
use sflllm::protocol::message::*;
use sflllm::terms::adapter::{AdapterShape, MatrixShape, Trained};
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::format::Format;
use sflllm::terms::ids::{ClientId, RoundKey, RunId, StepKey};
use sflllm::terms::moments::{MomentPolicy, Moments};
use sflllm::terms::optimizer::{OptimizerSettings, Schedule};
use sflllm::terms::speed::Speed;
use sflllm::terms::tensor::{WireForm, WireLayout, WireTensor, WireTensorError};

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn run() -> impl Strategy<Value = RunId> {
    any::<[u8; 16]>().prop_map(RunId)
}

fn text() -> impl Strategy<Value = String> {
    ".{0,12}"
}

fn number() -> impl Strategy<Value = f32> {
    prop::num::f32::POSITIVE | prop::num::f32::NEGATIVE | prop::num::f32::ZERO | prop::num::f32::SUBNORMAL
}

fn numbers() -> impl Strategy<Value = Vec<f32>> {
    vec(number(), 0..20)
}

fn duration() -> impl Strategy<Value = Duration> {
    any::<u64>().prop_map(Duration::from_micros)
}

fn client() -> impl Strategy<Value = ClientId> {
    any::<u64>().prop_map(ClientId)
}

fn round() -> impl Strategy<Value = RoundKey> {
    any::<(u32, u32)>().prop_map(|(round, attempt)| RoundKey { round, attempt })
}

fn step() -> impl Strategy<Value = StepKey> {
    (round(), any::<u32>()).prop_map(|(round, step)| round.step(step))
}

fn form() -> impl Strategy<Value = WireForm> {
    prop::sample::select(WireForm::ALL)
}

fn tensor() -> impl Strategy<Value = WireTensor> {
    let layout = (form(), 0..3_u32, 0..3_u32, 0..6_u32).prop_map(|(form, batch, seq, width)| WireLayout {
        form,
        batch,
        seq,
        width,
    });
    layout.prop_flat_map(|layout| {
        vec(any::<u8>(), layout.bytes().unwrap()).prop_map(move |bytes| WireTensor::new(layout, bytes).unwrap())
    })
}

fn version() -> impl Strategy<Value = Version> {
    any::<(u16, u16)>().prop_map(|(major, minor)| Version { major, minor })
}

fn blobs() -> impl Strategy<Value = Vec<Blob>> {
    vec(
        (text(), digest(), any::<u64>()).prop_map(|(name, sha256, bytes)| Blob { name, sha256, bytes }),
        0..4,
    )
}

fn optimizer() -> impl Strategy<Value = OptimizerSettings> {
    (
        (number(), number(), option::of(number())),
        prop::sample::select(Schedule::ALL),
        any::<(u32, u32)>(),
    )
        .prop_map(
            |((lr, weight_decay, clip), schedule, (warmup, total_steps))| OptimizerSettings {
                lr,
                weight_decay,
                schedule,
                warmup: warmup.into(),
                total_steps: total_steps.into(),
                clip,
            },
        )
}

fn config() -> impl Strategy<Value = RunConfig> {
    (
        any::<(u32, u32, u32, u32, u32, u32, u32, u32)>(),
        (any::<(u64, bool)>(), number(), vec(text(), 0..4)),
        prop::sample::select(Format::ALL.to_vec()),
        form(),
        (optimizer(), prop::sample::select(MomentPolicy::ALL)),
    )
        .prop_map(
            |(sizes, ((seed, shuffle), alpha, targets), weights, wire, (optimizer, moments))| RunConfig {
                split: sizes.0,
                rank: sizes.1,
                alpha,
                targets,
                weights,
                wire,
                batch: sizes.2,
                seq: sizes.3,
                width: sizes.4,
                vocab: sizes.5,
                seed,
                shuffle,
                local_steps: sizes.6,
                rounds: sizes.7,
                optimizer,
                moments,
            },
        )
}

fn moments() -> impl Strategy<Value = Moments> {
    (any::<u64>(), numbers(), numbers()).prop_map(|(steps, first, second)| Moments { steps, first, second })
}

fn speed() -> impl Strategy<Value = Speed> {
    (1.0..1e18_f64, 1.0..1e18_f64).prop_map(|(forward, backward)| Speed::new(forward, backward).unwrap())
}

fn rates() -> impl Strategy<Value = LinkRates> {
    (1.0..1e15_f64, 1.0..1e15_f64).prop_map(|(main, federated)| LinkRates::new(main, federated).unwrap())
}

fn member() -> impl Strategy<Value = Member> {
    (client(), digest(), any::<u64>(), option::of(any::<u32>())).prop_map(|(client, base, adapter_len, rank)| Member {
        client,
        base,
        adapter_len,
        rank,
    })
}

fn control() -> impl Strategy<Value = Control> {
    prop_oneof![
        (
            run(),
            any::<[u8; 32]>(),
            duration(),
            duration(),
            any::<u64>(),
            digest(),
            digest()
        )
            .prop_map(
                |(run, ticket_key, now, ticket_lifetime, largest_update, model, tokenizer)| {
                    Control::OpenRun {
                        run,
                        ticket_key,
                        now,
                        ticket_lifetime,
                        largest_update,
                        model,
                        tokenizer,
                    }
                }
            ),
        (round(), vec(member(), 0..5), any::<(u64, u64)>()).prop_map(
            |(round, members, (adapter_len, max_examples))| {
                Control::OpenRound {
                    round,
                    members,
                    adapter_len,
                    max_examples,
                }
            }
        ),
        (
            round(),
            option::of(any::<(u64, u64)>().prop_map(|(len, steps)| Leaving { len, steps })),
            vec(number(), 0..9)
        )
            .prop_map(|(round, moments, copy)| Control::Collect { round, moments, copy }),
        (round(), client()).prop_map(|(round, client)| Control::Departed { round, client }),
        Just(Control::CloseRun),
        vec(number(), 0..9).prop_map(|values| Control::Base { values }),
        rule().prop_map(Control::Rule),
    ]
}

fn exclusion() -> impl Strategy<Value = Exclusion> {
    let reasons = vec![
        ExclusionReason::Departed,
        ExclusionReason::Absent,
        ExclusionReason::WrongLength,
        ExclusionReason::NotFinite,
        ExclusionReason::WrongBase,
        ExclusionReason::Examples,
        ExclusionReason::Misbehaved,
        ExclusionReason::Late,
        ExclusionReason::Outlier,
    ];
    (client(), prop::sample::select(reasons)).prop_map(|(client, reason)| Exclusion { client, reason })
}

fn exact() -> impl Strategy<Value = Exact> {
    (vec(any::<u32>(), 0..4), numbers()).prop_map(|(ranks, values)| Exact { ranks, values })
}

fn errors() -> impl Strategy<Value = Errors> {
    (0.0..2.0_f64, 0.0..2.0_f64).prop_map(|(averaging, start)| Errors { averaging, start })
}

fn rule() -> impl Strategy<Value = Rule> {
    let matrix = (1_u32..99, 1_u32..99).prop_map(|(inputs, outputs)| MatrixShape { inputs, outputs });
    (prop::sample::select(Aggregation::ALL), 1_usize..99, vec(matrix, 1..4)).prop_map(
        |(aggregation, rank, matrices)| {
            let shape = AdapterShape::new(rank, aggregation.trained(), matrices).unwrap();
            Rule::new(aggregation, shape).unwrap()
        },
    )
}

fn reply() -> impl Strategy<Value = ControlReply> {
    let inclusion = (client(), any::<u64>()).prop_map(|(client, examples)| Inclusion { client, examples });
    prop_oneof![
        (round(), exclusion()).prop_map(|(round, exclusion)| ControlReply::Excluded { round, exclusion }),
        (round(), client(), any::<u64>()).prop_map(|(round, client, bytes)| ControlReply::Received {
            round,
            client,
            bytes
        }),
        (
            round(),
            vec(inclusion, 0..4),
            vec(exclusion(), 0..4),
            option::of(
                (
                    digest(),
                    numbers(),
                    option::of(moments()),
                    option::of(exact()),
                    option::of(errors())
                )
                    .prop_map(|(digest, values, moments, exact, errors)| Mean {
                        digest,
                        values,
                        moments,
                        exact: exact.map(Box::new),
                        errors,
                    })
            )
        )
            .prop_map(|(round, included, excluded, average)| {
                ControlReply::RoundClosed(RoundClosed {
                    round,
                    included,
                    excluded,
                    average,
                })
            }),
    ]
}

fn stop() -> impl Strategy<Value = Stop> {
    let reasons = vec![
        StopReason::Completed,
        StopReason::Shutdown,
        StopReason::Unexpected,
        StopReason::BadUpdate,
        StopReason::Excluded,
        StopReason::Superseded,
        StopReason::Late,
    ];
    (prop::sample::select(reasons), text(), option::of(duration())).prop_map(|(reason, detail, return_after)| Stop {
        reason,
        detail,
        return_after,
    })
}

fn alphas() -> impl Strategy<Value = Vec<OwnAlpha>> {
    let one = (any::<u32>(), text(), number()).prop_map(|(block, target, alpha)| OwnAlpha { block, target, alpha });
    vec(one, 0..4)
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        (
            (run(), any::<u32>(), config()),
            (
                text(),
                blobs(),
                blobs(),
                any::<u64>(),
                alphas(),
                prop::sample::select(Trained::ALL)
            )
        )
            .prop_map(
                |((run, number, config), (model_config, weights, tokenizer, adapter_len, alphas, trained))| {
                    Message::Assignment(Box::new(Assignment {
                        run,
                        number,
                        config,
                        model_config,
                        weights,
                        tokenizer,
                        adapter_len,
                        alphas,
                        trained,
                    }))
                }
            ),
        (any::<u32>(), option::of(speed())).prop_map(|(assignment, speed)| Message::Ready(Ready { assignment, speed })),
        (
            (round(), digest(), any::<u32>()),
            (option::of(numbers()), option::of(moments()), option::of(rates()))
        )
            .prop_map(|((round, base, members), (adapter, moments, rates))| {
                Message::RoundStart(RoundStart {
                    round,
                    base,
                    members,
                    adapter,
                    moments,
                    rates,
                })
            }),
        (step(), duration()).prop_map(|(key, backward)| Message::StepDone(StepDone { key, backward })),
        (round(), any::<u32>(), any::<u64>()).prop_map(|(round, split, steps)| Message::RoundEnd(RoundEnd {
            round,
            split,
            steps
        })),
        (step(), any::<u32>()).prop_map(|(key, members)| Message::StepStart(StepStart { key, members })),
        (
            step(),
            any::<(u32, u32)>(),
            duration(),
            vec(any::<i32>(), 0..9),
            tensor()
        )
            .prop_map(|(key, (split, examples), forward, targets, tensor)| {
                Message::Activations(Activations {
                    key,
                    split,
                    examples,
                    forward,
                    targets,
                    tensor,
                })
            }),
        (step(), any::<u64>(), digest(), number(), number(), tensor()).prop_map(
            |(key, tokens, activations, loss, mean_loss, tensor)| {
                Message::Gradient(Gradient {
                    key,
                    activations,
                    loss,
                    tokens,
                    mean_loss,
                    tensor,
                })
            }
        ),
        (run(), round(), digest(), any::<u64>(), numbers(), option::of(moments())).prop_map(
            |(run, round, base, examples, values, moments)| {
                Message::AdapterUpdate(AdapterUpdate {
                    run,
                    round,
                    base,
                    examples,
                    values,
                    moments,
                })
            }
        ),
        (round(), digest(), numbers()).prop_map(|(round, digest, values)| Message::Average(Average {
            round,
            digest,
            values
        })),
        (round(), option::of(round()), text())
            .prop_map(|(round, open, detail)| { Message::UpdateDeclined(UpdateDeclined { round, open, detail }) }),
        (any::<(u32, u32, u32, u32, u32)>(), option::of(prop::num::f64::NORMAL)).prop_map(
            |((round, rounds, included, steps, total_steps), valid_loss)| {
                Message::RoundResult(RoundResult {
                    round,
                    rounds,
                    included,
                    valid_loss,
                    steps,
                    total_steps,
                })
            }
        ),
        Just(Message::Leave),
        stop().prop_map(Message::Stop),
        control().prop_map(Message::Control),
        reply().prop_map(Message::ControlReply),
    ]
}

fn hello() -> impl Strategy<Value = Hello> {
    let credential = prop_oneof![
        Just(Credential::None),
        text().prop_map(Credential::Secret),
        vec(any::<u8>(), 0..80).prop_map(|bytes| Credential::Ticket(Ticket(bytes))),
    ];
    let services = vec![Service::Main, Service::Federated, Service::Control];
    let capabilities =
        (vec(form(), 0..4), any::<u64>(), text()).prop_map(|(forms, memory_bytes, device)| Capabilities {
            forms,
            memory_bytes,
            device,
        });
    (
        version(),
        prop::sample::select(services),
        credential,
        text(),
        option::of(digest()),
        option::of(digest()),
        capabilities,
    )
        .prop_map(
            |(version, service, credential, name, model, tokenizer, capabilities)| Hello {
                version,
                service,
                credential,
                name,
                model,
                tokenizer,
                capabilities,
            },
        )
}

fn answer() -> impl Strategy<Value = Answer> {
    let ticket = || vec(any::<u8>(), 0..80).prop_map(Ticket);
    let welcome = (
        (version(), client(), run(), ticket(), option::of(ticket())),
        (option::of(text()), duration(), digest(), digest()),
    )
        .prop_map(
            |((version, client, run, ticket, federated_ticket), (federated_url, ping_interval, model, tokenizer))| {
                Answer::Welcome(Welcome {
                    version,
                    client,
                    run,
                    ticket,
                    federated_ticket,
                    federated_url,
                    ping_interval,
                    model,
                    tokenizer,
                })
            },
        );
    let reasons = vec![
        RefusalReason::NotThisProtocol,
        RefusalReason::Version,
        RefusalReason::Malformed,
        RefusalReason::Service,
        RefusalReason::SecretMissing,
        RefusalReason::SecretWrong,
        RefusalReason::TicketForged,
        RefusalReason::TicketExpired,
        RefusalReason::TicketSpent,
        RefusalReason::TicketOtherRun,
        RefusalReason::Model,
        RefusalReason::Tokenizer,
        RefusalReason::WireForm,
        RefusalReason::NoRun,
        RefusalReason::Full,
        RefusalReason::Expelled,
        RefusalReason::Other,
    ];
    prop_oneof![
        welcome,
        (version(), prop::sample::select(reasons), text()).prop_map(|(version, reason, detail)| {
            Answer::Refused(Refused {
                version,
                reason,
                detail,
            })
        }),
    ]
}

proptest! {
    #[test]
    fn every_message_is_decoded_to_itself(message in message(), number: u32, acknowledged: u32) {
        let (kind, body) = encode_message(&message);
        let frame = Frame::Message { number, acknowledged, kind, body: &body };
        let bytes = encode_frame(frame);
        prop_assert_eq!(decode_frame(&bytes), Ok(frame));
        prop_assert_eq!(encode_message_frame(number, acknowledged, &message), bytes.clone());
        prop_assert_eq!(decode_message(kind, &body), Ok(message));
    }

    /// Numbers in the header change when a frame is sent again; a bit of anything after it is noticed.
    #[test]
    fn a_checked_message_is_decoded_to_itself_and_never_to_another(
        message in message(),
        bit: prop::sample::Index,
        number: u32,
    ) {
        let mut bytes = encode_checked_frame(number, 0, &message);
        let decode = |bytes: &[u8]| {
            let Ok(Frame::Message { kind, body, .. }) = decode_frame(bytes) else {
                panic!("no message")
            };
            decode_message(kind, body)
        };
        prop_assert_eq!(decode(&bytes), Ok(message.clone()));
        let checked = matches!(message, Message::Activations(_) | Message::Gradient(_) | Message::AdapterUpdate(_));
        prop_assert_eq!(bytes[0] == 33, checked);
        if checked {
            let bit = bit.index((bytes.len() - 9) * 8);
            bytes[9 + bit / 8] ^= 1 << (bit % 8);
            let refused = matches!(decode(&bytes), Err(DecodeError::Damaged | DecodeError::Unknown { .. }));
            prop_assert!(refused, "{:?}", decode(&bytes));
        }
    }

    #[test]
    fn every_greeting_and_answer_is_decoded_to_itself(hello in hello(), answer in answer()) {
        prop_assert_eq!(decode_hello(hello.version, &encode_hello(&hello)), Ok(hello));
        let (Answer::Welcome(Welcome { version, .. }) | Answer::Refused(Refused { version, .. })) = &answer;
        prop_assert_eq!(decode_answer(*version, &encode_answer(&answer)), Ok(answer));
    }

    #[test]
    fn a_message_cut_anywhere_or_with_a_byte_more_is_refused(message in message(), at: prop::sample::Index) {
        let (kind, mut body) = encode_message(&message);
        body.push(0);
        prop_assert_eq!(decode_message(kind, &body), Err(DecodeError::Trailing(1)));
        body.pop();
        if !body.is_empty() {
            let cut = decode_message(kind, &body[..at.index(body.len())]);
            prop_assert!(matches!(cut, Err(DecodeError::Truncated(_))), "{cut:?}");
        }
    }

    /// Speeds and rates are numbers that can be, or the message is none.
    #[test]
    fn impossible_speeds_and_rates_are_refused(first: f64, second in prop::num::f64::ANY) {
        let pair = [first.to_le_bytes(), second.to_le_bytes()].concat();
        let ready = Message::Ready(Ready { assignment: 3, speed: Speed::new(1.0, 1.0) });
        let (kind, mut body) = encode_message(&ready);
        let at = body.len() - 16;
        body[at..].copy_from_slice(&pair);
        let expected = Speed::new(first, second).ok_or(DecodeError::Range("Speed"));
        let decoded = decode_message(kind, &body);
        prop_assert_eq!(decoded, expected.map(|speed| Message::Ready(Ready { assignment: 3, speed: Some(speed) })));

        let start = |rates| RoundStart {
            round: RoundKey { round: 0, attempt: 0 },
            base: Digest([2; 32]),
            members: 1,
            adapter: None,
            moments: None,
            rates,
        };
        let (kind, mut body) = encode_message(&Message::RoundStart(start(LinkRates::new(1.0, 1.0))));
        let at = body.len() - 16;
        body[at..].copy_from_slice(&pair);
        let expected = LinkRates::new(first, second).ok_or(DecodeError::Range("LinkRates"));
        prop_assert_eq!(decode_message(kind, &body), expected.map(|rates| Message::RoundStart(start(Some(rates)))));
    }

    #[test]
    fn any_bytes_are_refused_or_understood_exactly(bytes in vec(any::<u8>(), 0..300), kind in 0_u8..40) {
        if let Ok(frame) = decode_frame(&bytes) {
            prop_assert_eq!(encode_frame(frame), bytes.clone());
        }
        if let Ok(message) = decode_message(kind, &bytes) {
            prop_assert_eq!(encode_message(&message), (kind, bytes));
        }
    }

    #[test]
    fn a_message_with_bytes_changed_is_refused_or_understood_exactly(
        message in message(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let (kind, mut body) = encode_message(&message);
        for (at, byte) in changes {
            if !body.is_empty() {
                let at = at.index(body.len());
                body[at] = byte;
            }
        }
        if let Ok(message) = decode_message(kind, &body) {
            prop_assert_eq!(encode_message(&message), (kind, body));
        }
    }

    #[test]
    fn any_greeting_bytes_are_refused_or_understood_exactly(
        tail in vec(any::<u8>(), 0..200),
        kind in 0_u8..5,
    ) {
        let mut bytes = b"SFLM".to_vec();
        bytes.push(kind);
        bytes.extend([1, 0, 0, 0]);
        bytes.extend(tail);
        if let Ok(hello) = decode_hello(PROTOCOL_VERSION, &bytes) {
            prop_assert_eq!(encode_hello(&hello), bytes.clone());
        }
        if let Ok(answer @ Answer::Welcome(_)) = decode_answer(PROTOCOL_VERSION, &bytes) {
            prop_assert_eq!(encode_answer(&answer), bytes);
        }
    }
}

/// A length that promises far more than is there: were it believed, 16 GiB would be asked for.
#[test]
fn a_length_is_not_believed_before_its_bytes_are_there() {
    let update = AdapterUpdate {
        run: RunId([1; 16]),
        round: RoundKey { round: 0, attempt: 0 },
        base: Digest([2; 32]),
        examples: 1,
        values: vec![1.0; 3],
        moments: None,
    };
    let (kind, mut body) = encode_message(&Message::AdapterUpdate(update));
    // After the values only the word that there are no moments.
    let length_at = body.len() - 1 - 3 * 4 - 4;
    for claim in [4, 0x4000_0000, u32::MAX] {
        body[length_at..length_at + 4].copy_from_slice(&u32::to_le_bytes(claim));
        assert_eq!(
            decode_message(kind, &body),
            Err(DecodeError::Truncated("numbers")),
            "{claim}"
        );
    }
}

#[test]
fn only_numbers_of_this_world_are_speeds_and_rates() {
    for number in [
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        0.0,
        -0.0,
        -1.0,
        0.5,
        1e19,
        f64::MAX,
        f64::MIN_POSITIVE,
    ] {
        assert_eq!(
            (Speed::new(number, 1e9), Speed::new(1e9, number)),
            (None, None),
            "{number}"
        );
        assert_eq!(
            (LinkRates::new(number, 1e6), LinkRates::new(1e6, number)),
            (None, None),
            "{number}"
        );
    }
    assert!(Speed::new(1.0, 1e18).is_some() && LinkRates::new(1.0, 1e15).is_some());
}

#[test]
fn a_refusal_can_be_read_whatever_version_sent_it() {
    let refused = Refused {
        version: Version { major: 900, minor: 1 },
        reason: RefusalReason::Version,
        detail: "update".to_owned(),
    };
    let mut bytes = encode_answer(&Answer::Refused(refused.clone()));
    assert_eq!(
        decode_answer(PROTOCOL_VERSION, &bytes),
        Ok(Answer::Refused(refused.clone()))
    );
    // A reason this version does not know, and more after it.
    bytes[9..11].copy_from_slice(&500_u16.to_le_bytes());
    bytes.extend([1, 2, 3]);
    let unknown = Refused {
        reason: RefusalReason::Other,
        ..refused
    };
    assert_eq!(decode_answer(PROTOCOL_VERSION, &bytes), Ok(Answer::Refused(unknown)));
}

#[test]
fn a_welcome_in_a_version_nobody_agreed_to_is_refused() {
    let theirs = Version {
        major: PROTOCOL_VERSION.major,
        minor: PROTOCOL_VERSION.minor + 1,
    };
    let welcome = Welcome {
        version: theirs,
        client: ClientId(1),
        run: RunId([0; 16]),
        ticket: Ticket(Vec::new()),
        federated_ticket: None,
        federated_url: None,
        ping_interval: Duration::from_secs(5),
        model: Digest([0; 32]),
        tokenizer: Digest([0; 32]),
    };
    let error = decode_answer(PROTOCOL_VERSION, &encode_answer(&Answer::Welcome(welcome)));
    assert_eq!(
        error,
        Err(GreetingError::Version {
            ours: PROTOCOL_VERSION,
            theirs
        })
    );
}

/// What travels, byte by byte: a tensor's layout stands where its fields stood one by one, its bytes at the end.
#[test]
fn the_bytes_of_a_step_and_of_an_assignment_are_those_of_this_version() {
    let key = StepKey {
        round: RoundKey { round: 7, attempt: 1 },
        step: 3,
    };
    let layout = WireLayout {
        form: WireForm::Int8,
        batch: 1,
        seq: 2,
        width: 3,
    };
    let payload: Vec<u8> = (0..16).collect();
    let tensor = WireTensor::new(layout, payload.clone()).unwrap();
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let bulk = |bytes: &[u8]| [&words(&[bytes.len() as u32])[..], bytes].concat();

    let activations = Activations {
        key,
        split: 5,
        examples: 1,
        forward: Duration::from_micros(9),
        targets: vec![-100, 4],
        tensor: tensor.clone(),
    };
    let expected = [
        words(&[7, 1, 3, 5, 1, 2, 3]),
        vec![2],
        words(&[1, 9, 0, 2, (-100_i32).cast_unsigned(), 4]),
        bulk(&payload),
    ];
    assert_eq!(
        encode_message(&Message::Activations(activations)),
        (20, expected.concat())
    );

    let gradient = Gradient {
        key,
        activations: Digest([6; 32]),
        loss: 1.5,
        tokens: 8,
        mean_loss: 2.5,
        tensor,
    };
    let expected = [
        words(&[7, 1, 3, 1, 2, 3]),
        vec![2],
        vec![6; 32],
        words(&[1.5_f32.to_bits(), 8, 0, 2.5_f32.to_bits()]),
        bulk(&payload),
    ];
    let gradient = Message::Gradient(gradient);
    assert_eq!(encode_message(&gradient), (21, expected.concat()));

    // Since 3.2 with its kind and a digest of kind and body behind it, as a kind of its own.
    let digest = Digest::of(&[vec![21], expected.concat()].concat());
    let checked = [vec![33], words(&[5, 6]), expected.concat(), vec![21], digest.0.to_vec()];
    assert_eq!(encode_checked_frame(5, 6, &gradient), checked.concat());

    let assignment = Assignment {
        run: RunId([4; 16]),
        number: 2,
        config: RunConfig {
            split: 1,
            rank: 8,
            alpha: 16.0,
            targets: vec!["c_fc".to_owned()],
            weights: Format::F32,
            wire: WireForm::F16,
            batch: 3,
            seq: 4,
            width: 5,
            vocab: 6,
            seed: 7,
            shuffle: true,
            local_steps: 10,
            rounds: 11,
            optimizer: OptimizerSettings {
                lr: 0.5,
                weight_decay: 0.25,
                schedule: Schedule::Linear,
                warmup: 12,
                total_steps: 1 << 40,
                clip: Some(1.0),
            },
            moments: MomentPolicy::Reset,
        },
        model_config: "{}".to_owned(),
        weights: Vec::new(),
        tokenizer: Vec::new(),
        adapter_len: 13,
        alphas: Vec::new(),
        trained: Trained::Both,
    };
    let expected = [
        vec![4; 16],
        words(&[2, 1, 8, 16_f32.to_bits(), 1]),
        bulk(b"c_fc"),
        vec![1, 1],
        words(&[3, 4, 5, 6, 7, 0]),
        vec![1],
        words(&[10, 11, 0.5_f32.to_bits(), 0.25_f32.to_bits()]),
        vec![1],
        // A step count past 32 bits is as large as fits.
        words(&[12, u32::MAX]),
        vec![1],
        words(&[1_f32.to_bits()]),
        vec![1],
        bulk(b"{}"),
        words(&[0, 0, 13, 0]),
    ];
    let (kind, body) = encode_message(&Message::Assignment(Box::new(assignment.clone())));
    assert_eq!((kind, body), (16, expected.concat()));

    // Where not all is trained it is a kind of its own, which came with 3.2.
    let frozen = Assignment {
        trained: Trained::B,
        ..assignment.clone()
    };
    let body = [expected.concat(), words(&[0]), vec![1]].concat();
    assert_eq!(encode_message(&Message::Assignment(Box::new(frozen))), (34, body));
    let nothing = [expected.concat(), words(&[0]), vec![0]].concat();
    assert_eq!(
        decode_message(34, &nothing),
        Err(DecodeError::Range("an assignment that freezes nothing"))
    );

    // With alphas it is a kind of its own, which came with 3.1.
    let with_alphas = Assignment {
        alphas: vec![OwnAlpha {
            block: 3,
            target: "mlp.c_fc".to_owned(),
            alpha: 2.5,
        }],
        ..assignment
    };
    let appended = [words(&[1, 3]), bulk(b"mlp.c_fc"), words(&[2.5_f32.to_bits()])].concat();
    let body = [expected.concat(), appended].concat();
    let message = Message::Assignment(Box::new(with_alphas));
    assert_eq!(encode_message(&message), (32, body.clone()));
    let empty = [expected.concat(), words(&[0])].concat();
    assert_eq!(
        decode_message(32, &empty),
        Err(DecodeError::Range("an empty list of alphas"))
    );
    let endless = [expected.concat(), words(&[u32::MAX])].concat();
    assert!(matches!(decode_message(32, &endless), Err(DecodeError::Truncated(_))));
}

/// What came with 3.2.
#[test]
fn the_bytes_of_what_is_late_or_too_far_are_those_of_this_version() {
    let base = Message::Control(Control::Base { values: vec![1.5] });
    let (kind, body) = encode_message(&base);
    let (other, _) = encode_message(&Message::Control(Control::CloseRun));
    assert_eq!(kind, other);
    assert_eq!(body, [&[5][..], &1_u32.to_le_bytes(), &1.5_f32.to_le_bytes()].concat());
    let endless = [&[5][..], &u32::MAX.to_le_bytes()].concat();
    assert!(matches!(decode_message(kind, &endless), Err(DecodeError::Truncated(_))));

    for (reason, code) in [(ExclusionReason::Late, 7), (ExclusionReason::Outlier, 8)] {
        let exclusion = Exclusion {
            client: ClientId(3),
            reason,
        };
        let round = RoundKey { round: 1, attempt: 2 };
        let (_, body) = encode_message(&Message::ControlReply(ControlReply::Excluded { round, exclusion }));
        let expected = [&[0][..], &[1, 0, 0, 0, 2, 0, 0, 0], &3_u64.to_le_bytes(), &[code]].concat();
        assert_eq!(body, expected);
    }
    let stop = Stop {
        reason: StopReason::Late,
        detail: String::new(),
        return_after: None,
    };
    let (_, body) = encode_message(&Message::Stop(stop));
    assert_eq!(body[0], 6);
    let refused = Refused {
        version: PROTOCOL_VERSION,
        reason: RefusalReason::Expelled,
        detail: String::new(),
    };
    // Magic, kind and version come before the reason.
    let bytes = encode_answer(&Answer::Refused(refused));
    assert_eq!(bytes[bytes.len() - 6..], [16, 0, 0, 0, 0, 0]);
}

/// What came with 3.2: a run says how adapters are aggregated, and who has a rank of its own.
#[test]
fn the_bytes_of_aggregation_are_those_of_this_version() {
    let (kind, _) = encode_message(&Message::Control(Control::CloseRun));
    let body = |control| {
        let (found, body) = encode_message(&Message::Control(control));
        assert_eq!(found, kind);
        body
    };
    let matrices = vec![MatrixShape { inputs: 3, outputs: 2 }];
    let shape = AdapterShape::new(4, Trained::Both, matrices).unwrap();
    let rule = body(Control::Rule(Rule::new(Aggregation::Flora, shape).unwrap()));
    let expected = [&[6, 3][..], &[4, 0, 0, 0], &[1, 0, 0, 0], &[3, 0, 0, 0], &[2, 0, 0, 0]].concat();
    assert_eq!(rule, expected);
    // A rank of zero, no matrix, more matrices than there are bytes.
    for (position, value) in [(2, 0), (6, 0)] {
        let mut wrong = expected[..if position == 6 { 10 } else { 18 }].to_vec();
        wrong[position] = value;
        let range = DecodeError::Range("the shape of an adapter");
        assert_eq!(decode_message(kind, &wrong), Err(range));
    }
    let mut endless = expected;
    endless[6..10].fill(255);
    assert!(matches!(decode_message(kind, &endless), Err(DecodeError::Truncated(_))));

    let member = |client, rank| Member {
        client: ClientId(client),
        base: Digest([7; 32]),
        adapter_len: 5,
        rank,
    };
    let open = |members| Control::OpenRound {
        round: RoundKey { round: 1, attempt: 2 },
        members,
        adapter_len: 9,
        max_examples: 8,
    };
    let plain = body(open(vec![member(1, None), member(2, None)]));
    let ranked = body(open(vec![member(1, None), member(2, Some(4))]));
    assert_eq!((plain[0], ranked[0]), (1, 7));
    assert_eq!(ranked[1..plain.len()], plain[1..]);
    assert_eq!(ranked[plain.len()..], [0, 1, 4, 0, 0, 0]);
    let unranked = [&[7][..], &plain[1..], &[0, 0]].concat();
    assert_eq!(
        decode_message(kind, &unranked),
        Err(DecodeError::Range("a list of no ranks"))
    );

    let closed = |exact: Option<Exact>, errors| {
        let mean = Mean {
            digest: Digest([9; 32]),
            values: vec![1.5],
            moments: None,
            exact: exact.map(Box::new),
            errors,
        };
        let closed = RoundClosed {
            round: RoundKey { round: 1, attempt: 2 },
            included: Vec::new(),
            excluded: Vec::new(),
            average: Some(mean),
        };
        encode_message(&Message::ControlReply(ControlReply::RoundClosed(closed))).1
    };
    let plain = closed(None, None);
    let exact = Exact {
        ranks: vec![1],
        values: vec![0.5],
    };
    let errors = Errors {
        averaging: 0.25,
        start: 0.5,
    };
    let more = closed(Some(exact), Some(errors));
    assert_eq!((plain[0], more[0]), (2, 3));
    assert_eq!(more[1..plain.len()], plain[1..]);
    let one = 1_u32.to_le_bytes();
    let appended = [
        &[1][..],
        &one,
        &one,
        &one,
        &0.5_f32.to_le_bytes(),
        &[1],
        &0.25_f64.to_le_bytes(),
        &0.5_f64.to_le_bytes(),
    ];
    assert_eq!(more[plain.len()..], appended.concat());
}

#[test]
fn a_tensor_whose_bytes_are_not_those_of_its_layout_is_refused() {
    let layout = WireLayout {
        form: WireForm::F32,
        batch: 1,
        seq: 1,
        width: 2,
    };
    let activations = Activations {
        key: RoundKey { round: 0, attempt: 0 }.step(0),
        split: 1,
        examples: 1,
        forward: Duration::ZERO,
        targets: vec![1],
        tensor: WireTensor::new(layout, vec![0; 8]).unwrap(),
    };
    let (kind, mut body) = encode_message(&Message::Activations(activations));
    // The width follows key, split, batch and seq.
    body[24] = 3;
    let layout = WireLayout { width: 3, ..layout };
    let error = WireTensorError { layout, found: 8 };
    assert_eq!(decode_message(kind, &body), Err(DecodeError::Tensor(error)));
}
