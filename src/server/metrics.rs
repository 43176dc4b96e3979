//! The run's log for machines: `metrics.jsonl`, one object a line.
//!
//! It is separate from the coordinator so that the fields have one definition, and so that a full disk is met in one place: it
//! costs lines, which are counted, and never the run. Rounds and steps count from 1; the line of round 0 is the validation
//! before training.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::planner::ClientPrediction;
use crate::disk;
use crate::terms::aggregation::Aggregation;
use crate::terms::phases::Phases;

/// A member's step. The upload is from when the client was free to start until its activations had come, less the forward pass; the
/// download from when its gradient went out until it was done, less the backward pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepPhases {
    pub client: u64,
    #[serde(flatten)]
    pub phases: Phases<f64>,
}

/// A member's round.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoundPhases {
    pub client: u64,
    #[serde(serialize_with = "predicted")]
    pub predicted: Option<ClientPrediction>,
    pub measured: MeasuredPhases,
}

/// A prediction as the log has it: without the way of the gradients, which emulated links have for nothing.
fn predicted<S: Serializer>(prediction: &Option<ClientPrediction>, serializer: S) -> Result<S::Ok, S::Error> {
    let fields = prediction.map(|ClientPrediction { step, federated_s }| {
        json!({
            "forward_s": step.forward, "upload_s": step.upload, "backward_s": step.backward, "federated_s": federated_s,
        })
    });
    fields.serialize(serializer)
}

/// Means over a member's steps, and the time from asking for its adapter until the federated server had it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct MeasuredPhases {
    #[serde(flatten)]
    pub step: Phases<f64>,
    pub federated_s: Option<f64>,
}

/// The server's part of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ServerPhase {
    pub predicted_s: Option<f64>,
    /// The mean over the round's steps.
    pub measured_s: Option<f64>,
}

/// Whether a step or a round has all who were members when it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Completeness {
    #[default]
    Full,
    Partial,
}

impl Completeness {
    /// Of a step or round that goes without so many.
    pub fn without(excluded: usize) -> Self {
        match excluded {
            0 => Self::Full,
            _ => Self::Partial,
        }
    }
}

/// One optimiser step of the server.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepRecord {
    pub round: u32,
    /// In the run, over all rounds.
    pub step: u32,
    /// Mean over all members' targets.
    pub loss: f64,
    /// Targets the loss is averaged over.
    pub tokens: u64,
    pub clients: usize,
    /// Whether all members of the round are in it.
    pub result: Completeness,
    /// Client numbers and why they are not in it.
    pub excluded: Vec<Value>,
    /// From the end of the step before (or the round's start) to the end of this one.
    pub seconds: f64,
    /// Of `seconds`, until the last member's activations had come.
    pub wait_seconds: f64,
    /// Of `seconds`, on the server's device.
    pub compute_seconds: f64,
    /// Received and sent on the main service since the last line.
    pub bytes_up: u64,
    pub bytes_down: u64,
    /// Of the members that did the whole step.
    pub phases: Vec<StepPhases>,
}

/// The end of a round.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct RoundRecord {
    pub round: u32,
    /// In the average.
    pub adapters: usize,
    /// Whether all members of the round are in it.
    pub result: Completeness,
    /// Client numbers and why they are not in the average.
    pub excluded: Vec<Value>,
    pub valid_loss: Option<f64>,
    pub valid_perplexity: Option<f64>,
    pub valid_tokens: Option<usize>,
    /// The planner's forecast, when there is one.
    pub predicted_s: Option<f64>,
    /// From the round's start to its average, without the time in which the next was planned.
    pub measured_s: f64,
    pub phases: Vec<RoundPhases>,
    pub server: ServerPhase,
    /// How its adapters became one.
    pub aggregation: Option<Aggregation>,
    /// `‖mean(B)·mean(A) − mean(B·A)‖ / ‖mean(B·A)‖` over all adapted matrices; nothing where it takes too long to tell.
    pub averaging_error: Option<f64>,
    /// `‖B·A − mean(B·A)‖ / ‖mean(B·A)‖` of what clients go on with; nothing where it takes too long to tell.
    pub start_error: Option<f64>,
    /// In the frames with the members' adapters.
    pub adapter_bytes: u64,
}

/// Where lines go.
trait Sink: Write + Send {
    /// Takes back what was written beyond `length` bytes.
    fn cut(&mut self, length: u64) -> io::Result<()>;

    /// Brings what was written to the disk.
    fn sync(&mut self) -> io::Result<()>;
}

impl Sink for File {
    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)?;
        self.seek(SeekFrom::Start(length)).map(|_| ())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// How far a log has come, for whoever goes on with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Of whole lines.
    pub bytes: u64,
    /// Lines that could not be written, in all and since the last that was.
    pub lost: u64,
    pub missing: u64,
}

/// Appends to `metrics.jsonl`.
pub struct Metrics {
    open: Box<dyn FnMut() -> io::Result<Box<dyn Sink>> + Send>,
    sink: Option<Box<dyn Sink>>,
    /// Bytes of whole lines.
    length: u64,
    /// Whether there may be a part of a line beyond them.
    torn: bool,
    /// Lines that are missing, in all and since the last that was written.
    lost: u64,
    missing: u64,
    trouble: Option<String>,
}

impl Metrics {
    /// Of the run in `directory`. The file is made with the first line, if not before.
    pub fn new(directory: &Path) -> Self {
        let path = directory.join("metrics.jsonl");
        Self::into(move || {
            let file = File::create(&path)?;
            Ok(Box::new(file))
        })
    }

    /// Goes on with the file in `directory` from `position`: lines beyond it are taken back. Where the file is shorter, all its whole
    /// lines are kept.
    ///
    /// # Errors
    /// The file cannot be opened or cut.
    pub fn resume(directory: &Path, position: Position) -> Result<Self, disk::Error> {
        let path = directory.join("metrics.jsonl");
        let open = move || {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        };
        let fail = |error| disk::Error::file("write", &directory.join("metrics.jsonl"), error);
        let mut file = open().map_err(fail)?;
        let mut length = position.bytes;
        if file.metadata().map_err(fail)?.len() < length {
            length = whole_lines(&mut file).map_err(fail)?;
        }
        file.cut(length).map_err(fail)?;
        let mut metrics = Self::into(move || Ok(Box::new(open()?)));
        metrics.sink = Some(Box::new(file));
        (metrics.length, metrics.lost, metrics.missing) = (length, position.lost, position.missing);
        Ok(metrics)
    }

    /// How far the file has come, which is on the disk then if the disk takes it.
    pub fn position(&mut self) -> Position {
        if let Some(sink) = &mut self.sink {
            // Whoever goes on finds a shorter file then.
            let _ = sink.sync();
        }
        Position {
            bytes: self.length,
            lost: self.lost,
            missing: self.missing,
        }
    }

    fn into(open: impl FnMut() -> io::Result<Box<dyn Sink>> + Send + 'static) -> Self {
        Self {
            open: Box::new(open),
            sink: None,
            length: 0,
            torn: false,
            lost: 0,
            missing: 0,
            trouble: None,
        }
    }

    /// Makes the file, where that is possible yet.
    pub fn open(&mut self) {
        if self.sink.is_none() {
            self.sink = (self.open)().ok();
        }
    }

    pub fn step(&mut self, record: &StepRecord) {
        self.line("step", serde_json::to_value(record).expect("a record has a JSON form"));
    }

    pub fn round(&mut self, record: &RoundRecord) {
        self.line("round", serde_json::to_value(record).expect("a record has a JSON form"));
    }

    /// Something that happened `at` seconds after the start; `fields` must be an object.
    pub fn event(&mut self, at: f64, event: &str, fields: Value) {
        let mut line = json!({ "at": at, "event": event });
        merge(&mut line, fields);
        self.line("event", line);
    }

    /// A line of another kind of run; `fields` must be an object.
    pub fn line(&mut self, kind: &str, fields: Value) {
        let mut line = json!({ "kind": kind });
        merge(&mut line, fields);
        match self.write(&line) {
            Ok(()) if self.missing == 0 => {}
            Ok(()) => {
                self.trouble = Some(format!(
                    "metrics.jsonl is written again; {} of its lines are missing",
                    self.missing
                ));
                self.missing = 0;
            }
            Err(error) => {
                if self.missing == 0 {
                    self.trouble = Some(format!(
                        "metrics.jsonl cannot be written ({error}); the run goes on without its lines until it can"
                    ));
                }
                self.missing += 1;
                self.lost += 1;
            }
        }
    }

    /// Lines that could not be written.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// That lines have begun to be lost, or no more are: once each time, for people.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// One write a line, so that a reader never sees half of one.
    fn write(&mut self, line: &Value) -> io::Result<()> {
        let sink = match &mut self.sink {
            Some(sink) => sink,
            none => none.insert((self.open)()?),
        };
        if self.torn {
            sink.cut(self.length)?;
            self.torn = false;
        }
        let mut text = String::new();
        if self.missing > 0 {
            let lost = json!({ "kind": "event", "event": "lines_lost", "lines": self.missing });
            text = format!("{lost}\n");
        }
        text += &format!("{line}\n");
        let written = sink.write_all(text.as_bytes());
        match &written {
            Ok(()) => self.length += text.len() as u64,
            Err(_) => self.torn = sink.cut(self.length).is_err(),
        }
        written
    }
}

/// Bytes of the whole lines that a file begins with.
fn whole_lines(file: &mut File) -> io::Result<u64> {
    let mut reader = BufReader::new(file);
    let (mut whole, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        match line.last() {
            Some(b'\n') => whole += read as u64,
            _ => return Ok(whole),
        }
    }
}

fn merge(line: &mut Value, fields: Value) {
    if let (Value::Object(line), Value::Object(fields)) = (line, fields) {
        line.extend(fields);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn every_line_is_an_object_with_its_kind() {
        let directory = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::new(directory.path());
        let step = StepRecord {
            round: 1,
            step: 2,
            loss: 3.5,
            tokens: 40,
            result: Completeness::Full,
            excluded: Vec::new(),
            clients: 2,
            seconds: 0.5,
            wait_seconds: 0.25,
            compute_seconds: 0.125,
            bytes_up: 10,
            bytes_down: 20,
            phases: vec![StepPhases {
                client: 7,
                phases: Phases {
                    upload: 0.25,
                    ..Phases::default()
                },
            }],
        };
        metrics.step(&step);
        let round = RoundRecord {
            round: 1,
            result: Completeness::Partial,
            adapters: 2,
            excluded: vec![json!({ "client": 3, "reason": "left the round" })],
            valid_loss: Some(2.0),
            valid_perplexity: Some(2.0_f64.exp()),
            valid_tokens: Some(100),
            predicted_s: None,
            measured_s: 1.5,
            phases: vec![RoundPhases::default()],
            server: ServerPhase::default(),
            aggregation: Some(Aggregation::Mean),
            averaging_error: Some(0.25),
            start_error: None,
            adapter_bytes: 7,
        };
        metrics.round(&round);
        metrics.event(0.5, "joined", json!({ "client": 1 }));
        let text = std::fs::read_to_string(directory.path().join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(
            (&lines[0]["kind"], &lines[0]["bytes_down"]),
            (&json!("step"), &json!(20))
        );
        assert_eq!(
            (&lines[0]["phases"][0]["client"], &lines[1]["phases"][0]["predicted"]),
            (&json!(7), &Value::Null)
        );
        assert_eq!(
            (&lines[1]["kind"], &lines[1]["excluded"][0]["client"]),
            (&json!("round"), &json!(3))
        );
        assert_eq!(
            (&lines[2]["kind"], &lines[2]["event"]),
            (&json!("event"), &json!("joined"))
        );
    }

    /// A disk with room for so many bytes more, and what it holds.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(usize, Vec<u8>)>>);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (room, held) = &mut *self.0.lock().unwrap();
            let taken = bytes.len().min(*room);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            *room -= taken;
            held.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Sink for Disk {
        fn cut(&mut self, length: u64) -> io::Result<()> {
            self.0.lock().unwrap().1.truncate(length as usize);
            Ok(())
        }

        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_costs_lines_which_are_counted_and_never_a_part_of_one() {
        let disk = Disk::default();
        let opened = disk.clone();
        let mut opens = 0;
        let mut metrics = Metrics::into(move || {
            opens += 1;
            match opens {
                1 => Err(io::ErrorKind::StorageFull.into()),
                _ => Ok(Box::new(opened.clone())),
            }
        });
        let room = |bytes| disk.0.lock().unwrap().0 = bytes;
        let held = || -> Vec<Value> {
            let text = String::from_utf8(disk.0.lock().unwrap().1.clone()).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        };
        let step = |metrics: &mut Metrics, step: u32| metrics.line("step", json!({ "step": step }));
        // No file, no room, and room for half a line: said once.
        step(&mut metrics, 1);
        let said = metrics.take_trouble().unwrap();
        assert!(said.contains("metrics.jsonl cannot be written"), "{said}");
        step(&mut metrics, 2);
        room(10);
        step(&mut metrics, 3);
        assert_eq!((metrics.take_trouble(), metrics.lost(), held().len()), (None, 3, 0));
        room(1000);
        step(&mut metrics, 4);
        let said = metrics.take_trouble().unwrap();
        assert!(said.contains("written again; 3 of its lines"), "{said}");
        step(&mut metrics, 5);
        room(5);
        step(&mut metrics, 6);
        assert!(metrics.take_trouble().is_some());
        room(1000);
        step(&mut metrics, 7);
        assert_eq!(metrics.lost(), 4);
        let steps: Vec<Value> = held().iter().map(|line| line["step"].clone()).collect();
        assert_eq!(steps, [json!(null), json!(4), json!(5), json!(null), json!(7)]);
        assert_eq!((&held()[0]["lines"], &held()[3]["lines"]), (&json!(3), &json!(1)));
    }

    #[test]
    fn whoever_goes_on_doubles_no_line_and_keeps_whole_ones_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let step = |metrics: &mut Metrics, step: u32| metrics.line("step", json!({ "step": step }));
        let text = || std::fs::read_to_string(&path).unwrap();
        let mut metrics = Metrics::new(directory.path());
        step(&mut metrics, 1);
        step(&mut metrics, 2);
        let position = metrics.position();
        let two = text();
        assert_eq!(position.bytes, two.len() as u64);
        step(&mut metrics, 3);
        step(&mut metrics, 4);
        let four = text();
        drop(metrics);

        let mut metrics = Metrics::resume(directory.path(), position).unwrap();
        assert_eq!(text(), two, "before anything is written");
        step(&mut metrics, 3);
        step(&mut metrics, 4);
        assert_eq!((text(), metrics.lost()), (four.clone(), 0));

        // A file that lost its end, in the middle of a line, or all.
        let ends = [four.len() - 3, two.len(), two.len() - 1, 0];
        for (end, whole) in ends.into_iter().zip([3, 2, 1, 0]) {
            std::fs::write(&path, &four[..end]).unwrap();
            let all = Position {
                bytes: four.len() as u64,
                ..position
            };
            let mut metrics = Metrics::resume(directory.path(), all).unwrap();
            step(&mut metrics, 9);
            assert_eq!(text().lines().count(), whole + 1, "{end}");
            assert!(text().lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
        }
        // Lines that were missing are told of by the next.
        let missing = Position {
            bytes: 0,
            lost: 5,
            missing: 2,
        };
        let mut metrics = Metrics::resume(directory.path(), missing).unwrap();
        step(&mut metrics, 1);
        assert!(
            text().starts_with("{\"event\":\"lines_lost\"") && text().contains("\"lines\":2"),
            "{}",
            text()
        );
        assert_eq!(metrics.lost(), 5);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Metrics::resume(directory.path(), position).is_err());
    }
}
