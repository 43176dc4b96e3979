//! An edge client's machine: what it keeps, what it tries again, and that it comes back as if it had never been away.

use std::fmt;
use std::time::Duration;

use proptest::prelude::*;
use sflllm::client::edge::{Checkpoint, *};
use sflllm::data::Cursor;
use sflllm::protocol::codec::{Answer, Frame, encode_answer, encode_frame, encode_message};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::simulation::{Fault, Scenario, Weather, simulate};
use sflllm::terms::ids::{ClientId, RoundKey, RunId};
use sflllm::terms::moments::Moments;

use super::peer::*;
use super::run::assert_sound;

// Whole runs, with processes that die.

/// A death in the middle of anything: before something is stored and after, before it is sent and after.
#[test]
fn a_client_that_dies_instead_of_any_output_comes_back_as_itself_and_no_bit_of_the_run_is_another() {
    let undisturbed = simulate(&Scenario::calm(1, 3, 3));
    assert_eq!(undisturbed.end, Some(RunEnd::Completed));
    let (mut deaths, mut lost, mut unknown) = (0, 0, 0);
    for output in 1.. {
        let scenario = Scenario {
            deaths: vec![(0, output)],
            ..Scenario::calm(1, 3, 3)
        };
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed), "output {output}");
        assert_eq!(outcome.clients[0].identities.len(), 1, "output {output}");
        unknown += usize::from(outcome.clients[0].identities != [ClientId(1)]);
        assert_eq!(outcome.model, undisturbed.model, "output {output}");
        assert_eq!(outcome.server, undisturbed.server, "output {output}");
        if outcome.elapsed == undisturbed.elapsed {
            // It was over by then.
            break;
        }
        deaths += 1;
        lost += usize::from(outcome.steps > undisturbed.steps);
    }
    assert!(deaths > 50 && lost > 20, "{deaths} deaths, {lost} lost rounds");
    assert_eq!(unknown, 1, "only before it has kept who it is, and said anything");
}

#[test]
fn a_connection_that_breaks_in_a_round_leaves_no_trace_of_it() {
    let undisturbed = simulate(&Scenario::calm(1, 3, 3));
    let total = undisturbed.rounds.last().unwrap().at;
    let mut lost = 0;
    for moment in 1..60 {
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            let scenario = Scenario {
                faults: vec![(total * moment / 60, Fault::Cut(0, endpoint))],
                ..Scenario::calm(1, 3, 3)
            };
            let outcome = simulate(&scenario);
            assert_sound(&outcome, &scenario);
            assert_eq!(outcome.model, undisturbed.model, "{:?}", scenario.faults);
            assert_eq!(outcome.clients[0].identities, [ClientId(1)]);
            lost += usize::from(outcome.steps > undisturbed.steps);
        }
    }
    assert!(lost > 10, "{lost} lost rounds");
}

#[test]
fn clients_that_keep_dying_stay_who_they_are_in_any_weather() {
    for seed in 0..60 {
        let deaths = (0..12).map(|death| (death as usize % 3, 9 + 13 * death + seed % 11));
        let scenario = Scenario {
            seed,
            weather: if seed % 2 == 0 { Weather::CALM } else { Weather::STORM },
            deaths: deaths.collect(),
            splits: if seed % 3 == 0 { vec![1, 3, 2] } else { Vec::new() },
            wait_for_client: seconds(600),
            ..Scenario::calm(3, 4, 3)
        };
        let outcome = simulate(&scenario);
        assert_sound(&outcome, &scenario);
        assert_eq!(outcome.end, Some(RunEnd::Completed), "{scenario:#?}");
        for client in &outcome.clients {
            assert_eq!(client.identities.len(), 1, "{scenario:#?}");
        }
    }
}

#[test]
fn who_keeps_nothing_comes_back_as_somebody_new() {
    let scenario = Scenario {
        keeps: false,
        deaths: vec![(0, 40)],
        ..Scenario::calm(1, 3, 3)
    };
    let outcome = simulate(&scenario);
    assert_sound(&outcome, &scenario);
    assert_eq!(outcome.end, Some(RunEnd::Completed));
    assert_eq!(outcome.clients[0].identities, [ClientId(1), ClientId(2)]);
}

// The machine alone, in the test's hands.

const RUN: RunId = RunId([1; 16]);

#[derive(Clone, Debug, PartialEq)]
struct Trouble {
    passes: bool,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it went wrong")
    }
}

impl Cause for Trouble {
    fn may_pass(&self) -> bool {
        self.passes
    }
}

const PASSES: Trouble = Trouble { passes: true };
const STAYS: Trouble = Trouble { passes: false };

struct Table {
    edge: Edge<Trouble>,
    now: Duration,
    sent: u32,
}

fn standing(value: f32) -> Standing {
    Standing {
        moments: Moments {
            steps: 2,
            first: vec![value; ADAPTER.len()],
            second: vec![value; ADAPTER.len()],
        },
        cursor: Cursor { epoch: 1, position: 2 },
    }
}

fn state() -> State {
    State {
        passport: Passport {
            run: RUN,
            client: ClientId(1),
            ticket: Ticket(vec![9]),
        },
        server: "http://server".to_owned(),
        data: Some(Digest::of(b"data")),
        checkpoints: vec![
            Checkpoint {
                round: 0,
                standing: standing(0.0),
            },
            Checkpoint {
                round: 1,
                standing: standing(1.0),
            },
        ],
    }
}

impl Table {
    fn new(resume: Option<State>) -> Table {
        Table::with(Config {
            client: ClientConfig {
                give_up: seconds(12 * 3600),
                ..client_config()
            },
            server: "http://server".to_owned(),
            keeps: true,
            resume,
        })
    }

    fn with(config: Config) -> Table {
        let now = seconds(77);
        Table {
            edge: Edge::new(config, now),
            now,
            sent: 0,
        }
    }

    fn outputs(&mut self) -> Vec<Output<Trouble>> {
        std::iter::from_fn(|| self.edge.poll()).collect()
    }

    /// Those that are not shown to people only.
    fn asked(&mut self) -> Vec<Output<Trouble>> {
        let mut outputs = self.outputs();
        outputs.retain(|output| !matches!(output, Output::Show(_)));
        outputs
    }

    /// What is left when everything was stored and nothing else was asked for.
    fn asked_and_stored(&mut self) -> Vec<Output<Trouble>> {
        let mut asked = Vec::new();
        loop {
            let outputs = self.asked();
            let stores = outputs.iter().any(|output| matches!(output, Output::Store(_)));
            asked.extend(outputs.into_iter().filter(|output| !matches!(output, Output::Store(_))));
            if !stores {
                return asked;
            }
            self.edge.stored(self.now, Ok(()));
        }
    }

    /// Lets time pass up to the next timeout.
    fn pass(&mut self) {
        let due = self.edge.poll_timeout().expect("it waits for nothing");
        self.now = self.now.max(due);
        self.edge.timeout(self.now);
    }

    fn welcome(&mut self, endpoint: Endpoint, ticket: u8) {
        self.edge.connected(endpoint, self.now);
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            client: ClientId(1),
            run: RUN,
            ticket: Ticket(vec![ticket]),
            federated_ticket: (endpoint == Endpoint::Main).then(|| Ticket(vec![7])),
            federated_url: None,
            ping_interval: PING_INTERVAL,
            model: Digest::of(b"model"),
            tokenizer: Digest::of(b"tokenizer"),
        };
        let bytes = encode_answer(&Answer::Welcome(welcome));
        self.edge.frame(endpoint, self.now, &bytes);
        if endpoint == Endpoint::Main {
            self.sent = 0;
        }
    }

    fn frame(&mut self, message: &Message) -> Vec<u8> {
        let (kind, body) = encode_message(message);
        let frame = Frame::Message {
            number: self.sent,
            acknowledged: 0,
            kind,
            body: &body,
        };
        self.sent += 1;
        encode_frame(frame)
    }

    fn send(&mut self, message: &Message) {
        let bytes = self.frame(message);
        self.edge.frame(Endpoint::Main, self.now, &bytes);
    }

    /// In the run, with an assignment that is to be fetched.
    fn fetching(resume: Option<State>) -> (Table, Fetch) {
        let mut table = Table::new(resume);
        table.welcome(Endpoint::Main, 10);
        table.asked_and_stored();
        table.welcome(Endpoint::Federated, 11);
        table.send(&Message::Assignment(Box::new(assignment(RUN))));
        let asked = table.asked_and_stored();
        assert!(
            asked
                .iter()
                .any(|output| matches!(output, Output::Compute(Task::Assign(_)))),
            "{asked:?}"
        );
        table.edge.done(table.now, Ok(Done::Assigned(Wanted::default())));
        let asked = table.asked_and_stored();
        let fetch = asked.into_iter().find_map(|output| match output {
            Output::Fetch(fetch) => Some(fetch),
            _ => None,
        });
        (table, fetch.expect("nothing is fetched"))
    }

    /// Loaded, and ready for a round.
    fn ready(resume: Option<State>) -> Table {
        let (mut table, fetch) = Table::fetching(resume);
        table.edge.fetched(table.now, fetch.number, Ok(()));
        assert_eq!(table.asked_and_stored(), [Output::Compute(Task::Load)]);
        let loaded = Done::Loaded {
            speed: None,
            data: Digest::of(b"data"),
            summary: None,
        };
        table.edge.done(table.now, Ok(loaded));
        table.asked_and_stored();
        table
    }

    /// Begins a round and its first step. Returns what the beginning restores, and whether it keeps where training stands.
    fn begin(&mut self, round: RoundKey) -> (Option<Standing>, bool) {
        self.send(&Message::RoundStart(RoundStart {
            round,
            base: Digest::of_values(&ADAPTER),
            members: 1,
            adapter: Some(ADAPTER.to_vec()),
            moments: None,
            rates: None,
        }));
        let asked = self.asked_and_stored();
        assert!(
            matches!(&asked[..], [Output::Compute(Task::Install { .. })]),
            "{asked:?}"
        );
        self.edge.done(self.now, Ok(Done::Installed));
        let asked = self.asked_and_stored();
        let [Output::Compute(Task::BeginRound { restore, keep, .. })] = &asked[..] else {
            panic!("{asked:?}")
        };
        let found = (restore.as_deref().cloned(), *keep);
        self.edge.done(self.now, Ok(Done::Began(keep.then(|| standing(5.0)))));
        self.asked_and_stored();
        found
    }
}

const FIRST: RoundKey = RoundKey { round: 0, attempt: 0 };

fn transmits(outputs: &[Output<Trouble>]) -> usize {
    let frames = outputs
        .iter()
        .filter(|output| matches!(output, Output::Transmit { .. }));
    frames.count()
}

fn waits(outputs: &[Output<Trouble>]) -> Vec<(Awaited, Duration, Duration)> {
    let waits = outputs.iter().filter_map(|output| match output {
        Output::Show(Report::Waiting {
            what, again_in, passed, ..
        }) => Some((*what, *again_in, *passed)),
        _ => None,
    });
    waits.collect()
}

#[test]
fn nothing_is_sent_before_what_it_builds_on_is_stored() {
    let mut table = Table::new(None);
    table.welcome(Endpoint::Main, 10);
    // Long enough for a ping to be due.
    table.now += seconds(6);
    table.edge.timeout(table.now);
    let asked = table.asked();
    let Some(Output::Store(bytes)) = asked.iter().find(|output| matches!(output, Output::Store(_))) else {
        panic!("{asked:?}")
    };
    let kept = State::decode(bytes).unwrap();
    assert_eq!(kept.passport.ticket, Ticket(vec![10]), "of the next connection");
    let stored_at = asked.iter().position(|output| matches!(output, Output::Store(_)));
    assert_eq!(transmits(&asked[stored_at.unwrap()..]), 0, "{asked:?}");
    // Nor does a second store begin before the first has ended.
    table.send(&Message::Assignment(Box::new(assignment(RUN))));
    let asked = table.asked();
    assert_eq!(transmits(&asked), 0, "{asked:?}");
    table.edge.stored(table.now, Ok(()));
    assert!(transmits(&table.asked()) > 0);
}

#[test]
fn an_adapter_is_sent_when_it_is_kept_that_its_data_is_used_up() {
    let mut table = Table::ready(None);
    assert_eq!(table.begin(FIRST), (None, true));
    table.send(&Message::StepStart(StepStart {
        key: FIRST.step(0),
        members: 1,
    }));
    assert_eq!(
        table.asked_and_stored(),
        [Output::Compute(Task::Forward(FIRST.step(0)))]
    );
    table.send(&Message::RoundEnd(RoundEnd {
        round: FIRST,
        split: 1,
        steps: 1,
    }));
    let activations = ActivationsInput {
        key: FIRST.step(0),
        examples: 1,
        forward: Duration::ZERO,
        targets: vec![1, 2],
        tensor: zeros(1, 2, 2),
    };
    table.edge.done(table.now, Ok(Done::Activations(activations)));
    let asked = table.asked_and_stored();
    assert!(
        matches!(asked[..], [Output::Compute(Task::Collect { .. })]),
        "what was too late is not sent: {asked:?}"
    );
    let input = AdapterInput {
        round: FIRST,
        examples: 1,
        values: ADAPTER.to_vec(),
        moments: None,
    };
    table.edge.done(table.now, Ok(Done::Adapter(input, standing(3.0))));
    let asked = table.asked();
    let [Output::Store(bytes)] = &asked[..] else {
        panic!("{asked:?}")
    };
    let kept = State::decode(bytes).unwrap();
    let rounds: Vec<u32> = kept.checkpoints.iter().map(|checkpoint| checkpoint.round).collect();
    assert_eq!(rounds, [0, 1]);
    assert_eq!(kept.checkpoints[1].standing, standing(3.0));
    table.edge.stored(table.now, Ok(()));
    assert_eq!(transmits(&table.asked()), 1);
}

#[test]
fn a_round_begins_where_the_last_that_came_to_something_ended() {
    let later = |round, attempt| RoundKey { round, attempt };
    for (round, restored, keeps) in [
        // The round it was in, begun again.
        (later(1, 1), Some(standing(1.0)), false),
        // The server has lost the end of the round before.
        (later(0, 3), Some(standing(0.0)), false),
        // It has gone on without this client.
        (later(2, 0), Some(standing(1.0)), true),
    ] {
        let mut table = Table::ready(Some(state()));
        assert_eq!(table.begin(round), (restored, keeps), "{round}");
    }
    // Without anything kept there is nothing to go back to, nor is there where nothing has happened since.
    let mut table = Table::ready(None);
    assert_eq!(table.begin(FIRST), (None, true));
    assert_eq!(table.begin(later(0, 1)), (None, false));
    table.send(&Message::StepStart(StepStart {
        key: later(0, 1).step(0),
        members: 1,
    }));
    table.asked_and_stored();
    table.edge.done(
        table.now,
        Ok(Done::Activations(ActivationsInput {
            key: later(0, 1).step(0),
            examples: 1,
            forward: Duration::ZERO,
            targets: vec![1, 2],
            tensor: zeros(1, 2, 2),
        })),
    );
    table.asked_and_stored();
    assert_eq!(table.begin(later(0, 2)), (Some(standing(5.0)), false));
}

#[test]
fn other_data_begins_at_its_first_example_with_the_moments_that_were_kept() {
    let (mut table, fetch) = Table::fetching(Some(state()));
    table.edge.fetched(table.now, fetch.number, Ok(()));
    table.asked_and_stored();
    let loaded = Done::Loaded {
        speed: None,
        data: Digest::of(b"other data"),
        summary: None,
    };
    table.edge.done(table.now, Ok(loaded));
    let outputs = table.outputs();
    assert!(outputs.contains(&Output::Show(Report::OtherData)), "{outputs:?}");
    table.edge.stored(table.now, Ok(()));
    table.asked_and_stored();
    let (restored, _) = table.begin(RoundKey { round: 1, attempt: 1 });
    let expected = Standing {
        cursor: Cursor::default(),
        ..standing(1.0)
    };
    assert_eq!(restored, Some(expected));
}

#[test]
fn a_full_disk_is_told_once_and_tried_again_and_the_run_goes_on() {
    let mut table = Table::new(None);
    table.welcome(Endpoint::Main, 10);
    table.asked();
    table.edge.stored(table.now, Err("no space left".to_owned()));
    let outputs = table.outputs();
    let told = |outputs: &[Output<Trouble>]| {
        let unsaved = |output: &&Output<Trouble>| matches!(output, Output::Show(Report::Unsaved { .. }));
        outputs.iter().filter(unsaved).count()
    };
    assert_eq!(told(&outputs), 1);
    table.welcome(Endpoint::Federated, 11);
    table.send(&Message::Assignment(Box::new(assignment(RUN))));
    let outputs = table.outputs();
    assert!(
        outputs.iter().any(|output| matches!(output, Output::Compute(_))),
        "{outputs:?}"
    );
    // Every half minute, and with news.
    let begin = table.now;
    let mut tries = 0;
    while table.now < begin + seconds(95) {
        table.pass();
        for output in table.outputs() {
            if matches!(output, Output::Store(_)) {
                tries += 1;
                table.edge.stored(table.now, Err("no space left".to_owned()));
                assert_eq!(told(&table.outputs()), 0, "told again");
            }
        }
        // The server answers.
        for endpoint in [Endpoint::Main, Endpoint::Federated] {
            table.edge.heard(endpoint);
        }
    }
    assert_eq!(tries, 3);
    while table.edge.poll_timeout().is_some() {
        table.pass();
        if table.outputs().iter().any(|output| matches!(output, Output::Store(_))) {
            break;
        }
    }
    table.edge.stored(table.now, Ok(()));
    assert!(table.outputs().contains(&Output::Show(Report::Saved)));
}

#[test]
fn what_cannot_be_fetched_is_tried_again_until_it_can_and_given_up_where_that_is_no_use() {
    let (mut table, fetch) = Table::fetching(None);
    for _ in 0..20 {
        table.edge.fetched(table.now, fetch.number, Err(PASSES));
        let outputs = table.outputs();
        let waits = waits(&outputs);
        assert!(
            matches!(waits[..], [(Awaited::Weights, again_in, _)] if again_in <= seconds(30)),
            "{outputs:?}"
        );
        let mut again = Vec::new();
        while again.is_empty() {
            table.pass();
            again = table.asked();
            again.retain(|output| matches!(output, Output::Fetch(_)));
            for endpoint in [Endpoint::Main, Endpoint::Federated] {
                table.edge.heard(endpoint);
            }
        }
        assert_eq!(again, [Output::Fetch(fetch.clone())]);
    }
    // An answer to an older question is none.
    table.edge.fetched(table.now, fetch.number + 1, Ok(()));
    assert_eq!(transmits(&table.asked()), 0);
    table.edge.fetched(table.now, fetch.number, Ok(()));
    assert_eq!(table.asked(), [Output::Compute(Task::Load)]);

    let (mut table, fetch) = Table::fetching(None);
    table.edge.fetched(table.now, fetch.number, Err(STAYS));
    let asked = table.asked();
    assert_eq!(asked.last(), Some(&Output::End(Err(Failure::Driver(STAYS)))));
    assert_eq!(table.asked(), []);
}

#[test]
fn a_new_assignment_ends_the_fetching_of_the_one_before() {
    let (mut table, fetch) = Table::fetching(None);
    table.send(&Message::Assignment(Box::new(reassignment())));
    let asked = table.asked();
    assert!(matches!(&asked[..], [Output::Compute(Task::Assign(_))]), "{asked:?}");
    assert!(!table.edge.is_fetching(fetch.number));
    table.edge.fetched(table.now, fetch.number, Err(STAYS));
    table.edge.done(table.now, Ok(Done::Assigned(Wanted::default())));
    let asked = table.asked();
    assert!(
        matches!(&asked[..], [Output::Fetch(next)] if next.number > fetch.number),
        "{asked:?}"
    );
}

#[test]
fn a_frame_that_comes_twice_asks_for_nothing_twice() {
    let mut table = Table::new(None);
    table.welcome(Endpoint::Main, 10);
    table.asked_and_stored();
    let bytes = table.frame(&Message::Assignment(Box::new(assignment(RUN))));
    for _ in 0..2 {
        table.edge.frame(Endpoint::Main, table.now, &bytes);
    }
    let asked = table.asked_and_stored();
    let tasks = asked.iter().filter(|output| matches!(output, Output::Compute(_)));
    assert_eq!(tasks.count(), 1, "{asked:?}");
    table.edge.done(table.now, Ok(Done::Assigned(Wanted::default())));
    let asked = table.asked_and_stored();
    assert!(matches!(&asked[..], [Output::Fetch(_)]), "{asked:?}");
    // An answer without a question is none.
    table.edge.done(table.now, Ok(Done::Installed));
    assert_eq!(table.asked(), []);
}

/// Every connection fails from the beginning. Returns when the machine gave up, and what it told people.
fn unreachable(mut table: Table) -> (Duration, Vec<(Awaited, Duration, Duration)>, Output<Trouble>) {
    let begin = table.now;
    let mut told = Vec::new();
    loop {
        let outputs = table.outputs();
        if outputs.is_empty() {
            table.pass();
        }
        told.extend(waits(&outputs));
        for output in outputs {
            match output {
                Output::Connect { endpoint, .. } => {
                    table.now += Duration::from_millis(10);
                    table.edge.disconnected(endpoint, table.now, Some(PASSES));
                }
                Output::End(_) => return (table.now - begin, told, output),
                _ => {}
            }
        }
    }
}

#[test]
fn a_server_that_is_gone_is_tried_for_hours_under_a_countdown() {
    let (after, told, end) = unreachable(Table::new(Some(state())));
    assert_eq!(end, Output::End(Err(Failure::Driver(PASSES))));
    let hours = seconds(12 * 3600);
    assert!((hours..hours + seconds(60)).contains(&after), "{after:?}");
    // Once a second, and never for longer than half a minute.
    assert!(told.len() > 12 * 3600 / 2, "{}", told.len());
    for pair in told.windows(2) {
        let ((_, before, passed_before), (what, again_in, passed)) = (pair[0], pair[1]);
        assert_eq!(what, Awaited::Server(Endpoint::Main));
        assert!(again_in <= seconds(30) && passed >= passed_before);
        assert!(
            passed - passed_before <= seconds(2),
            "{passed:?} after {passed_before:?}"
        );
        assert!(
            again_in < before || before <= seconds(1),
            "{again_in:?} after {before:?}"
        );
    }
}

#[test]
fn the_federated_server_is_told_of_only_while_the_main_server_is_there() {
    let mut table = Table::ready(None);
    table.edge.disconnected(Endpoint::Federated, table.now, None);
    let told = waits(&table.outputs());
    assert!(
        matches!(told[..], [(Awaited::Server(Endpoint::Federated), _, _)]),
        "{told:?}"
    );
    let mut table = Table::ready(None);
    table.edge.disconnected(Endpoint::Main, table.now, None);
    table.edge.disconnected(Endpoint::Federated, table.now, None);
    let until = table.now + Duration::from_millis(200);
    let mut told = waits(&table.outputs());
    while table.edge.poll_timeout().is_some_and(|due| due < until) {
        table.pass();
        told.extend(waits(&table.outputs()));
    }
    assert!(!told.is_empty());
    let is_main = |(what, ..): &(Awaited, Duration, Duration)| *what == Awaited::Server(Endpoint::Main);
    assert!(told.iter().all(is_main), "{told:?}");
}

#[test]
fn a_server_that_was_never_there_is_soon_given_up() {
    let (after, _, end) = unreachable(Table::new(None));
    assert_eq!(end, Output::End(Err(Failure::Driver(PASSES))));
    assert!((seconds(6)..seconds(20)).contains(&after), "{after:?}");
    // What no trying again helps against, at once.
    let mut table = Table::new(Some(state()));
    table.outputs();
    table.edge.disconnected(Endpoint::Main, table.now, Some(STAYS));
    let asked = table.asked();
    assert_eq!(asked.last(), Some(&Output::End(Err(Failure::Driver(STAYS)))));
}

#[test]
fn a_server_that_says_when_it_is_back_is_believed() {
    let mut table = Table::ready(None);
    let away = seconds(3600);
    table.send(&Message::Stop(Stop {
        reason: StopReason::Shutdown,
        detail: "a new disk".to_owned(),
        return_after: Some(away),
    }));
    let outputs = table.outputs();
    assert_eq!(waits(&outputs), [(Awaited::Return, away, Duration::ZERO)]);
    let left = table.now;
    let mut told = 0;
    loop {
        table.pass();
        let outputs = table.outputs();
        told += waits(&outputs).len();
        if outputs.iter().any(|output| {
            matches!(
                output,
                Output::Connect {
                    endpoint: Endpoint::Main,
                    ..
                }
            )
        }) {
            break;
        }
        assert!(
            !outputs.iter().any(|output| matches!(output, Output::Connect { .. })),
            "{outputs:?}"
        );
    }
    assert_eq!(table.now, left + away);
    assert!(told > 3000, "{told}");
    // One that says nothing is gone for good.
    let mut table = Table::ready(None);
    table.send(&Message::Stop(Stop {
        reason: StopReason::Shutdown,
        detail: "for good".to_owned(),
        return_after: None,
    }));
    let asked = table.asked();
    assert!(
        matches!(
            asked.last(),
            Some(Output::End(Ok(FinishReason::Stopped { detail }))) if detail == "for good"
        ),
        "{asked:?}"
    );
}

#[test]
fn who_leaves_finishes_what_is_being_computed_and_forgets_nothing() {
    let mut table = Table::ready(None);
    table.begin(FIRST);
    let key = FIRST.step(0);
    table.send(&Message::StepStart(StepStart { key, members: 1 }));
    assert_eq!(table.asked_and_stored(), [Output::Compute(Task::Forward(key))]);
    table.edge.leave(table.now);
    assert_eq!(table.asked(), []);
    let activations = ActivationsInput {
        key,
        examples: 1,
        forward: Duration::ZERO,
        targets: vec![1, 2],
        tensor: zeros(1, 2, 2),
    };
    table.edge.done(table.now, Ok(Done::Activations(activations)));
    let asked = table.asked_and_stored();
    assert!(transmits(&asked) >= 2, "activations and a goodbye: {asked:?}");
    assert_eq!(asked.last(), Some(&Output::End(Ok(FinishReason::Left))));
    assert!(!asked.contains(&Output::Forget));
}

#[test]
fn a_run_that_is_complete_is_forgotten() {
    let mut table = Table::ready(Some(state()));
    table.send(&Message::Stop(Stop {
        reason: StopReason::Completed,
        detail: String::new(),
        return_after: None,
    }));
    let asked = table.asked_and_stored();
    let end = asked.len() - 2;
    assert_eq!(asked[end..], [Output::Forget, Output::End(Ok(FinishReason::Completed))]);
}

#[test]
fn what_was_kept_of_another_run_is_of_no_use() {
    let mut kept = state();
    kept.passport.run = RunId([2; 16]);
    let mut table = Table::new(Some(kept));
    table.outputs();
    table.welcome(Endpoint::Main, 10);
    let outputs = table.outputs();
    assert!(outputs.contains(&Output::Show(Report::OtherRun)), "{outputs:?}");
    let stored = outputs.iter().find_map(|output| match output {
        Output::Store(bytes) => Some(State::decode(bytes).unwrap()),
        _ => None,
    });
    let stored = stored.expect("the new passport is not stored");
    assert_eq!((stored.passport.run, stored.checkpoints.len()), (RUN, 0));
}

// What is kept, as bytes.

fn states() -> impl Strategy<Value = State> {
    let numbers = prop::collection::vec(0.0_f32..1e6, 0..20);
    let checkpoint = (numbers, any::<u64>(), any::<u64>(), any::<u64>());
    (
        any::<[u8; 16]>(),
        any::<u64>(),
        prop::collection::vec(any::<u8>(), 0..80),
        ".{0,40}",
        any::<Option<[u8; 32]>>(),
        prop::collection::vec(checkpoint, 0..3),
    )
        .prop_map(|(run, client, ticket, server, data, checkpoints)| State {
            passport: Passport {
                run: RunId(run),
                client: ClientId(client),
                ticket: Ticket(ticket),
            },
            server,
            data: data.map(Digest),
            checkpoints: checkpoints
                .into_iter()
                .enumerate()
                .map(|(round, (numbers, steps, epoch, position))| Checkpoint {
                    round: 7 * round as u32,
                    standing: Standing {
                        moments: Moments {
                            steps,
                            first: numbers.iter().map(|number| -number).collect(),
                            second: numbers,
                        },
                        cursor: Cursor { epoch, position },
                    },
                })
                .collect(),
        })
}

proptest! {
    #[test]
    fn a_state_comes_back_from_its_bytes_and_no_other_bytes_are_taken_for_one(
        state in states(), at in any::<prop::sample::Index>(), bit in 0_u8..8,
    ) {
        let bytes = state.encode();
        prop_assert_eq!(State::decode(&bytes), Ok(state));
        let mut damaged = bytes.clone();
        damaged[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(State::decode(&damaged).is_err());
        prop_assert!(State::decode(&bytes[..at.index(bytes.len())]).is_err());
    }

    #[test]
    fn bytes_of_any_kind_are_no_state_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(State::decode(&bytes).is_err());
    }
}

/// States of this version are read by every later one, or refused by their version.
#[test]
fn a_state_of_version_1_is_these_bytes() {
    let bytes = state().encode();
    assert_eq!(bytes[..6], *b"SFLC\x01\x00");
    assert_eq!(bytes[6..22], [1; 16], "run");
    assert_eq!(bytes[22..30], 1_u64.to_le_bytes(), "client");
    assert_eq!(bytes[30..35], [1, 0, 0, 0, 9], "ticket");
    assert_eq!(bytes[35..52], *b"\x0d\x00\x00\x00http://server");
    assert_eq!(bytes[52..85], *[&[1][..], &Digest::of(b"data").0].concat(), "data");
    assert_eq!(bytes[85..93], [2, 0, 0, 0, 0, 0, 0, 0], "two checkpoints, of round 0");
    let of_newer = [b"SFLC\x02\x00", &bytes[6..]].concat();
    assert_eq!(State::decode(&of_newer), Err(StateError::Version { found: 2 }));
    let mut negative = state();
    negative.checkpoints[0].standing.moments.second[0] = -1.0;
    assert_eq!(
        State::decode(&negative.encode()),
        Err(StateError::Impossible("moments"))
    );
    let mut falling = state();
    falling.checkpoints.reverse();
    assert_eq!(State::decode(&falling.encode()), Err(StateError::Impossible("rounds")));
}
