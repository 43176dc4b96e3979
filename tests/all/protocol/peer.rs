//! A small run, its configurations, and peers that speak to one session frame by frame and need not be honest.

use std::collections::BTreeMap;
use std::time::Duration;

use sflllm::protocol::codec::{
    self, Answer, Frame, decode_answer, decode_frame, decode_message, encode_frame, encode_hello, encode_message,
};
use sflllm::protocol::message::*;
use sflllm::protocol::*;
use sflllm::terms::format::Format;
use sflllm::terms::ids::{RoundKey, RunId, StepKey};
use sflllm::terms::optimizer::{OptimizerSettings, Schedule};
use sflllm::terms::tensor::{IGNORED_TARGET, WireForm, WireLayout, WireTensor};

pub const SECRET: &str = "open sesame";
pub const ADAPTER: [f32; 4] = [0.5, -0.25, 2.0, 0.0];

pub const READY: Message = Message::Ready(Ready {
    assignment: 0,
    speed: None,
});

pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

pub fn capabilities() -> Capabilities {
    Capabilities {
        forms: vec![WireForm::F32],
        memory_bytes: 1 << 30,
        device: "test".to_owned(),
    }
}

/// Batch 2, sequence 3, width 2, vocabulary 10; two rounds of two steps.
pub fn assignment(run: RunId) -> Assignment {
    let config = RunConfig {
        rank: 1,
        alpha: 2.0,
        weights: Format::F16,
        wire: WireForm::F32,
        seed: 1,
        local_steps: 2,
        rounds: 2,
        optimizer: OptimizerSettings {
            lr: 1e-3,
            schedule: Schedule::Linear,
            warmup: 1,
            total_steps: 4,
            clip: Some(1.0),
            ..OptimizerSettings::default()
        },
        ..RunConfig::new(1, (2, 3), (2, 10), ["c_attn"])
    };
    Assignment {
        adapter_len: ADAPTER.len() as u64,
        ..Assignment::new(run, config, "{}".to_owned())
    }
}

/// That run cut after two blocks.
pub fn reassignment() -> Assignment {
    let first = assignment(RunId([1; 16]));
    Assignment {
        number: 1,
        config: RunConfig {
            split: 2,
            ..first.config.clone()
        },
        adapter_len: 8,
        ..first
    }
}

pub fn main_config(clients: u32) -> MainConfig {
    let placement = Placement::new(assignment(RunId([1; 16])), ADAPTER.to_vec());
    MainConfig {
        ticket_lifetime: seconds(3600),
        secret: Some(SECRET.to_owned()),
        max_clients: 100,
        model: Digest::of(b"model"),
        tokenizer: Digest::of(b"tokenizer"),
        ..MainConfig::new(placement, [2; 32], clients)
    }
}

pub fn federated_config() -> FederatedConfig {
    FederatedConfig {
        max_clients: 100,
        ..FederatedConfig::default()
    }
}

pub fn client_config() -> ClientConfig {
    ClientConfig {
        secret: Some(SECRET.to_owned()),
        give_up: seconds(3600),
        seed: 1,
        ..ClientConfig::new("Ada", capabilities())
    }
}

pub fn hello(service: Service, credential: Credential) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        service,
        credential,
        name: "Ada".to_owned(),
        model: None,
        tokenizer: None,
        capabilities: capabilities(),
    }
}

pub fn secret() -> Credential {
    Credential::Secret(SECRET.to_owned())
}

/// What the servers have in common, so that the same peer can talk to either.
pub trait Server {
    fn open(&mut self, connection: ConnectionId, now: Duration);
    fn hear(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]);
    fn say(&mut self) -> Option<Transmit<ConnectionId>>;
}

impl Server for MainServerSession {
    fn open(&mut self, connection: ConnectionId, now: Duration) {
        self.connected(connection, now);
    }

    fn hear(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        self.handle_frame(connection, now, bytes);
    }

    fn say(&mut self) -> Option<Transmit<ConnectionId>> {
        self.poll_transmit()
    }
}

impl Server for FederatedServerSession {
    fn open(&mut self, connection: ConnectionId, now: Duration) {
        self.connected(connection, now);
    }

    fn hear(&mut self, connection: ConnectionId, now: Duration, bytes: &[u8]) {
        self.handle_frame(connection, now, bytes);
    }

    fn say(&mut self) -> Option<Transmit<ConnectionId>> {
        self.poll_transmit()
    }
}

/// A peer that speaks frame by frame and says whatever the test likes.
pub struct Peer {
    pub connection: ConnectionId,
    pub sent: u32,
    pub received: u32,
}

/// What a server said to one connection: messages, and whether it closed the connection after them.
#[derive(Debug, Default, PartialEq)]
pub struct Said {
    pub answers: Vec<Answer>,
    pub messages: Vec<Message>,
    pub closed: bool,
}

pub fn listen(server: &mut impl Server, connection: ConnectionId) -> Said {
    listen_to_all(server).remove(&connection).unwrap_or_default()
}

/// What a server said to every connection.
pub fn listen_to_all(server: &mut impl Server) -> BTreeMap<ConnectionId, Said> {
    let mut all: BTreeMap<ConnectionId, Said> = BTreeMap::new();
    while let Some(transmit) = server.say() {
        match transmit {
            Transmit::Frame { to, bytes } => {
                let said = all.entry(to).or_default();
                assert!(!said.closed, "nothing is sent after the close");
                if codec::is_greeting(&bytes) {
                    said.answers.push(decode_answer(PROTOCOL_VERSION, &bytes).unwrap());
                } else if let Frame::Message { kind, body, .. } = decode_frame(&bytes).unwrap() {
                    said.messages.push(decode_message(kind, body).unwrap());
                }
            }
            Transmit::Close { to } => all.entry(to).or_default().closed = true,
        }
    }
    all
}

pub fn greet(server: &mut impl Server, number: u64, now: Duration, hello: &Hello) -> Said {
    let connection = ConnectionId(number);
    server.open(connection, now);
    server.hear(connection, now, &encode_hello(hello));
    listen(server, connection)
}

pub fn refusal(said: &Said) -> Option<RefusalReason> {
    match said.answers.as_slice() {
        [Answer::Refused(refused)] if said.closed => Some(refused.reason),
        _ => None,
    }
}

pub fn welcome(said: &Said) -> Welcome {
    match said.answers.as_slice() {
        [Answer::Welcome(welcome)] if !said.closed => welcome.clone(),
        other => panic!("expected a welcome, got {other:?}, closed: {}", said.closed),
    }
}

impl Peer {
    pub fn join(server: &mut impl Server, number: u64, hello: &Hello) -> (Peer, Welcome) {
        let said = greet(server, number, Duration::ZERO, hello);
        let welcome = welcome(&said);
        let received = said.messages.len() as u32;
        (
            Peer {
                connection: ConnectionId(number),
                sent: 0,
                received,
            },
            welcome,
        )
    }

    pub fn send(&mut self, server: &mut impl Server, message: &Message) -> Said {
        let (kind, body) = encode_message(message);
        self.send_body(server, kind, &body)
    }

    /// The same at a later time.
    pub fn send_at(&mut self, server: &mut impl Server, now: Duration, message: &Message) -> Said {
        let (kind, body) = encode_message(message);
        let frame = Frame::Message {
            number: self.sent,
            acknowledged: self.received,
            kind,
            body: &body,
        };
        self.sent += 1;
        server.hear(self.connection, now, &encode_frame(frame));
        let said = listen(server, self.connection);
        self.received += said.messages.len() as u32;
        said
    }

    pub fn send_body(&mut self, server: &mut impl Server, kind: u8, body: &[u8]) -> Said {
        let frame = Frame::Message {
            number: self.sent,
            acknowledged: self.received,
            kind,
            body,
        };
        self.sent += 1;
        server.hear(self.connection, Duration::ZERO, &encode_frame(frame));
        let said = listen(server, self.connection);
        self.received += said.messages.len() as u32;
        said
    }

    pub fn ping(&self, server: &mut impl Server, now: Duration) {
        let frame = Frame::Ping {
            nonce: 0,
            acknowledged: self.received,
        };
        server.hear(self.connection, now, &encode_frame(frame));
        listen(server, self.connection);
    }
}

pub fn stop_reason(said: &Said) -> Option<StopReason> {
    match said.messages.last() {
        Some(Message::Stop(stop)) if said.closed => Some(stop.reason),
        _ => None,
    }
}

pub fn events(main: &mut MainServerSession) -> Vec<MainEvent> {
    std::iter::from_fn(|| main.poll_event()).collect()
}

pub const KEY: StepKey = StepKey {
    round: RoundKey { round: 0, attempt: 0 },
    step: 0,
};

pub fn good_activations() -> Activations {
    Activations {
        key: KEY,
        split: 1,
        examples: 2,
        forward: Duration::ZERO,
        targets: vec![1, 2, 9, IGNORED_TARGET],
        tensor: zeros(2, 2, 2),
    }
}

pub fn tensor(batch: u32, seq: u32, width: u32, bytes: Vec<u8>) -> WireTensor {
    let layout = WireLayout {
        form: WireForm::F32,
        batch,
        seq,
        width,
    };
    WireTensor::new(layout, bytes).unwrap()
}

pub fn zeros(batch: u32, seq: u32, width: u32) -> WireTensor {
    tensor(batch, seq, width, vec![0; 4 * (batch * seq * width) as usize])
}

/// Zeros of the same layout, but in halves.
pub fn halves(batch: u32, seq: u32, width: u32) -> WireTensor {
    let layout = WireLayout {
        form: WireForm::F16,
        batch,
        seq,
        width,
    };
    WireTensor::new(layout, vec![0; layout.bytes().unwrap()]).unwrap()
}

/// A message with a tensor of f32 that no [`WireTensor`] can be: one of this layout and so many bytes. The layout stands at `at`, and
/// the tensor's bytes, of which the message has so many, at the end.
pub fn misfit(message: &Message, (at, len): (usize, usize), layout: [u32; 3], bytes: usize) -> (u8, Vec<u8>) {
    let (kind, mut body) = encode_message(message);
    for (place, size) in body[at..].chunks_exact_mut(4).zip(layout) {
        place.copy_from_slice(&size.to_le_bytes());
    }
    body.truncate(body.len() - len - 4);
    body.extend((bytes as u32).to_le_bytes());
    body.resize(body.len() + bytes, 0);
    (kind, body)
}
