//! What strangers can do to a server, and members beyond their part: real sockets against a server in this process, and against one
//! that may open few files.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use sflllm::compute::Engine;
use sflllm::model::adapter::Adapter;
use sflllm::model::architecture::Architecture;
use sflllm::model::weights::{Holding, Weights};
use sflllm::protocol::codec::{
    Answer, Frame, decode_answer, decode_frame, decode_message, encode_frame, encode_hello, is_greeting,
};
use sflllm::protocol::message::{
    Assignment, Capabilities, Credential, Digest, Hello, Message as Said, PROTOCOL_VERSION, RefusalReason, Service,
    Ticket, Welcome,
};
use sflllm::protocol::{Deadline, DepartureReason, PING_INTERVAL};
use sflllm::runs::directory::RunDirectory;
use sflllm::server::{Ending, Limits, Model, Report, Role, Run, Server, Settings, Stopper, Summary};
use sflllm::split::Training;
use sflllm::terms::aggregation::Aggregation;
use sflllm::terms::format::Format;
use sflllm::terms::optimizer::OptimizerSettings;
use sflllm::terms::tensor::WireForm;
use tokio::runtime::Runtime;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// Generous: a machine may be slow. Nothing is asserted about time.
const LIMIT: Duration = Duration::from_secs(120);
/// Longer than any test.
const NEVER: Duration = Duration::from_secs(24 * 60 * 60);
const TOKEN: &str = "paper-boat";

/// A server that waits for two clients, and so for ever.
struct Serving {
    runtime: Runtime,
    home: tempfile::TempDir,
    address: SocketAddr,
    reports: Arc<Mutex<Vec<Report>>>,
    stopper: Stopper,
    ended: tokio::task::JoinHandle<Result<Summary, sflllm::server::Error>>,
}

fn main_run() -> Run {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gpt2_peft/legacy");
    let config = Architecture::load(&fixture.join("model")).unwrap();
    let initial = Adapter::load(&fixture.join("adapter"), &config).unwrap();
    Run {
        model: Model {
            name: "legacy".to_owned(),
            digest: Digest([0; 32]),
            weights: Weights::open(&fixture.join("model"), &config).unwrap(),
            holding: Holding::As(Format::F32),
            tokenizer: None,
            architecture: config.clone(),
        },
        engine: Engine::cpu(),
        training: Training {
            spec: initial.spec.clone(),
            optimizer: OptimizerSettings::default(),
            batch: 2,
            seq: config.positions,
            wire: WireForm::F32,
        },
        cut: 1,
        initial,
        validation: None,
        rounds: 1,
        local_steps: 1,
        seed: 1,
        shuffle: false,
        clients: 2,
        wait: NEVER,
        deadline: Deadline::Auto,
        quorum: None,
        aggregation: Aggregation::Mean,
        ranks: Vec::new(),
        planner: None,
    }
}

impl Serving {
    fn main(limits: Limits) -> Self {
        Self::start("http://127.0.0.1:0", Role::Both, Some(main_run()), limits)
    }

    fn start(listen: &str, role: Role, run: Option<Run>, limits: Limits) -> Self {
        let home = tempfile::tempdir().unwrap();
        let settings = Settings {
            role,
            listen: vec![listen.parse().unwrap()],
            token: Some(TOKEN.to_owned()),
            operator: None,
            hosts: Vec::new(),
            limits,
            home: home.path().to_owned(),
            directory: RunDirectory::create(Some(&home.path().join("run")), "gate").unwrap(),
            demo_data: b"".into(),
            run,
            interrupted: None,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let heard = reports.clone();
        let report = move |report| heard.lock().unwrap().push(report);
        let server = runtime.block_on(Server::start(settings, Box::new(report))).unwrap();
        let url = server.addresses()[0].local_url.clone();
        let (_, address) = url.split_once("://").unwrap();
        Self {
            address: address.parse().unwrap(),
            home,
            reports,
            stopper: server.stopper(),
            ended: runtime.spawn(server.serve()),
            runtime,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// The answer to a request with these further header lines: status and all of it in lower case.
    fn get(&self, path: &str, host: &str, lines: &str) -> (u16, String) {
        let mut stream = self.connect();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{lines}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer).to_lowercase();
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        (status.unwrap_or_else(|| panic!("no answer: {answer}")), answer)
    }

    /// An open WebSocket over which nothing has been said.
    fn socket(&self, service: &str) -> Guest<'_> {
        let stream = self.connect();
        stream.set_nonblocking(true).unwrap();
        self.socket_on(service, stream)
    }

    fn socket_on(&self, service: &str, stream: TcpStream) -> Guest<'_> {
        let socket = self.runtime.block_on(async {
            let request = format!("ws://{}/{service}", self.address)
                .into_client_request()
                .unwrap();
            let stream = tokio::net::TcpStream::from_std(stream).unwrap();
            tokio_tungstenite::client_async(request, stream).await.unwrap().0
        });
        Guest { serving: self, socket }
    }

    /// Tells the clients and ends; the lines of the metrics.
    fn stop(self) -> Vec<Value> {
        self.runtime.block_on(self.stopper.stop("the test has seen enough"));
        let summary = self.runtime.block_on(self.ended).unwrap().unwrap();
        assert!(matches!(summary.ending, Ending::Stopped(_)), "{summary:?}");
        let text = std::fs::read_to_string(self.home.path().join("run/metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

struct Guest<'a> {
    serving: &'a Serving,
    socket: WebSocketStream<tokio::net::TcpStream>,
}

impl Guest<'_> {
    fn say(&mut self, bytes: Vec<u8>) {
        let sending = self.socket.send(Message::Binary(bytes.into()));
        self.serving.runtime.block_on(sending).unwrap();
    }

    /// The next frame; `None` when the connection is closed.
    fn hear(&mut self) -> Option<Vec<u8>> {
        let hearing = async {
            loop {
                match tokio::time::timeout(LIMIT, self.socket.next())
                    .await
                    .expect("the server is silent")
                {
                    Some(Ok(Message::Binary(bytes))) => return Some(bytes.to_vec()),
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                    Some(Ok(_)) => {}
                }
            }
        };
        self.serving.runtime.block_on(hearing)
    }

    /// What a greeting is answered; `None` when the connection is closed instead.
    fn greet(&mut self, service: Service, credential: Credential) -> Option<Answer> {
        self.say(encode_hello(&hello(service, credential)));
        let bytes = self.hear()?;
        Some(decode_answer(PROTOCOL_VERSION, &bytes).unwrap())
    }

    fn join(&mut self, credential: Credential) -> Welcome {
        match self.greet(Service::Main, credential) {
            Some(Answer::Welcome(welcome)) => welcome,
            other => panic!("not let in: {other:?}"),
        }
    }

    /// The assignment, which follows the welcome.
    fn assignment(&mut self) -> Assignment {
        loop {
            let bytes = self.hear().expect("an assignment");
            if is_greeting(&bytes) {
                continue;
            }
            if let Frame::Message { kind, body, .. } = decode_frame(&bytes).unwrap()
                && let Said::Assignment(assignment) = decode_message(kind, body).unwrap()
            {
                return *assignment;
            }
        }
    }
}

fn hello(service: Service, credential: Credential) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        service,
        credential,
        name: "guest".to_owned(),
        model: None,
        tokenizer: None,
        capabilities: Capabilities {
            forms: WireForm::ALL.to_vec(),
            memory_bytes: 0,
            device: String::new(),
        },
    }
}

fn secret(text: &str) -> Credential {
    Credential::Secret(text.to_owned())
}

fn refusal(answer: Option<Answer>) -> Option<RefusalReason> {
    match answer {
        Some(Answer::Refused(refused)) => Some(refused.reason),
        None => None,
        Some(Answer::Welcome(_)) => panic!("let in"),
    }
}

/// Reads until the server closes; fails when it does not.
fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut read = Vec::new();
    match stream.read_to_end(&mut read) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("the server keeps the connection: {error}"),
    }
    read
}

fn patient() -> Limits {
    Limits {
        patience: NEVER,
        ..Limits::default()
    }
}

#[test]
fn idle_connections_make_room_and_keep_nobody_out() {
    let limits = Limits {
        strangers: 8,
        strangers_per_address: 8,
        ..patient()
    };
    let server = Serving::main(limits);
    let mut member = server.socket("main");
    let ticket = member.join(secret(TOKEN)).ticket;
    let mut idle: Vec<TcpStream> = (0..60).map(|_| server.connect()).collect();
    // They come through the gate in any order.
    idle.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
    while idle.len() > 8 {
        idle.retain_mut(|stream| match stream.read(&mut [0]) {
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            Ok(bytes) => bytes > 0,
        });
        std::thread::yield_now();
    }
    // A stranger, a newcomer and a member that comes back, from the very same address.
    assert_eq!(server.get("/", "localhost", "").0, 200);
    let mut newcomer = server.socket("main");
    newcomer.join(secret(TOKEN));
    let mut again = server.socket("main");
    again.join(Credential::Ticket(ticket));
    newcomer.assignment();
    let metrics = server.stop();
    let turned_away = metrics
        .iter()
        .filter_map(|line| line["reasons"]["too many connections at once"].as_u64())
        .sum::<u64>();
    assert!(turned_away >= 52, "{turned_away}");
}

/// As many descriptors as a frugal system gives, and more idle connections than that.
#[test]
fn a_run_ends_well_among_more_idle_connections_than_files_may_be_open() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let script = "ulimit -n 200 && exec \"$0\" serve --listen http://127.0.0.1:0 --device cpu --rounds 1 --local-steps 2 --batch 2 \
                  --out \"$1\"";
    let mut server = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_sflllm")])
        .arg(&out)
        .env("SFLLLM_HOME", directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = io::BufReader::new(server.stderr.take().unwrap());
    let url = loop {
        let mut line = String::new();
        assert!(
            io::BufRead::read_line(&mut said, &mut line).unwrap() > 0,
            "the server ended"
        );
        if let Some(url) = line.trim_end().strip_prefix("listening on ") {
            break url.to_owned();
        }
    };
    let rest = std::thread::spawn(move || io::read_to_string(said).unwrap());
    let address = url.strip_prefix("http://").unwrap();
    let idle: Vec<TcpStream> = (0..500).map(|_| TcpStream::connect(address).unwrap()).collect();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/train.txt");
    let client = Command::new(env!("CARGO_BIN_EXE_sflllm"))
        .args(["join", &url, "--device", "cpu", "--data"])
        .arg(&data)
        .env("SFLLLM_HOME", directory.path().join("client"))
        .output()
        .unwrap();
    let client_said = String::from_utf8_lossy(&client.stderr).into_owned();
    let status = server.wait().unwrap();
    let said = rest.join().unwrap();
    assert!(client.status.success(), "{client_said}\n{said}");
    assert!(status.success() && said.contains("the run is complete"), "{said}");
    assert!(out.join("adapter/adapter_config.json").is_file());
    drop(idle);
}

#[test]
fn whoever_dawdles_is_closed_at_every_stage() {
    let hurried = || Limits {
        patience: Duration::from_secs(2),
        ..Limits::default()
    };
    let server = Serving::main(hurried());
    let mut silent = server.connect();
    let mut half = server.connect();
    half.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n").unwrap();
    let mut answered = server.connect();
    answered
        .write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let mut upgraded = server.socket("main");
    assert_eq!(until_closed(&mut silent), b"");
    assert_eq!(until_closed(&mut half), b"");
    assert!(
        until_closed(&mut answered).starts_with(b"HTTP/1.1 200"),
        "kept open between requests only"
    );
    assert_eq!(upgraded.hear(), None);

    let secure = Serving::start("https://127.0.0.1:0", Role::Both, Some(main_run()), hurried());
    let mut no_handshake = secure.connect();
    assert_eq!(until_closed(&mut no_handshake), b"");
    // The beginning of a ClientHello of 512 bytes.
    let mut half_handshake = secure.connect();
    half_handshake.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).unwrap();
    until_closed(&mut half_handshake);

    // A member takes its time, between pings.
    assert!(hurried().patience < PING_INTERVAL);
    let mut member = server.socket("main");
    member.join(secret(TOKEN));
    member.assignment();
    let frames: Vec<_> = (0..2).map(|_| member.hear()).collect();
    assert!(frames.iter().all(Option::is_some), "{frames:?}");
}

#[test]
fn a_stranger_cannot_make_the_server_hold_a_large_frame() {
    let server = Serving::main(patient());
    let stream = server.connect();
    let guest = {
        let copy = stream.try_clone().unwrap();
        copy.set_nonblocking(true).unwrap();
        server.socket_on("main", copy)
    };
    stream.set_nonblocking(false).unwrap();
    let mut stream = stream;
    // A binary frame of a million bytes, as the run's members may send, without its end.
    let mut frame = vec![0x82, 0xff];
    frame.extend(1_000_000_u64.to_be_bytes());
    frame.extend([0; 4 + 999_999]);
    // The server may close before it was all sent.
    let sent = stream.write_all(&frame);
    drop(sent);
    assert_eq!(until_closed(&mut stream), b"");
    drop(guest);

    // As does an endless header.
    let mut stream = server.connect();
    let header = [&b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: "[..], &[b'a'; 300_000]].concat();
    drop(stream.write_all(&header));
    let answer = until_closed(&mut stream);
    assert!(
        !answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
}

#[test]
fn guesses_are_few_however_many_sockets_were_opened_before_and_members_return() {
    let server = Serving::main(patient());
    let mut member = server.socket("main");
    let welcome = member.join(secret(TOKEN));
    let mut guests: Vec<Guest> = (0..40).map(|_| server.socket("main")).collect();
    let answers: Vec<_> = (guests.iter_mut())
        .map(|guest| refusal(guest.greet(Service::Main, secret("guess"))))
        .collect();
    let wrong = answers
        .iter()
        .filter(|answer| **answer == Some(RefusalReason::SecretWrong));
    assert_eq!(wrong.count(), 10, "{answers:?}");
    assert_eq!(
        answers.iter().filter(|answer| answer.is_none()).count(),
        30,
        "{answers:?}"
    );
    // One guess a connection.
    assert_eq!(guests[0].hear(), None);
    // The right token is not told from others then, or guessing would go on; a ticket is.
    assert_eq!(server.socket("main").greet(Service::Main, secret(TOKEN)), None);
    let mut again = server.socket("main");
    assert_eq!(again.join(Credential::Ticket(welcome.ticket)).client, welcome.client);
    drop((member, guests, again));
    let metrics = server.stop();
    let refused: Vec<&Value> = metrics.iter().filter(|line| line["event"] == "refused").collect();
    assert_eq!(refused.iter().filter(|line| line["address"].is_string()).count(), 10);
    let counted: u64 = refused.iter().filter_map(|line| line["count"].as_u64()).sum();
    assert_eq!(counted, 31, "{refused:?}");
}

#[test]
fn tokens_that_are_right_are_never_too_many() {
    let server = Serving::main(patient());
    for _ in 0..30 {
        server.socket("main").join(secret(TOKEN));
    }
}

#[test]
fn garbage_is_counted_and_not_logged_one_by_one() {
    let server = Serving::main(patient());
    for _ in 0..60 {
        let mut guest = server.socket("main");
        guest.say(b"not a greeting".to_vec());
        let answer = guest
            .hear()
            .map(|bytes| decode_answer(PROTOCOL_VERSION, &bytes).unwrap());
        assert_eq!(refusal(answer), Some(RefusalReason::NotThisProtocol));
    }
    let reports = server.reports.clone();
    let metrics = server.stop();
    let refused: Vec<&Value> = metrics.iter().filter(|line| line["event"] == "refused").collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0]["count"], 60);
    let reports = reports.lock().unwrap();
    let told = reports.iter().filter(|report| matches!(report, Report::Refused { .. }));
    assert_eq!(told.count(), 0);
}

const GUARDS: [&str; 3] = [
    "x-content-type-options: nosniff",
    "referrer-policy: no-referrer",
    "content-security-policy: default-src 'self'",
];

#[test]
fn a_page_from_elsewhere_reaches_nothing() {
    let server = Serving::main(patient());
    let port = server.address.port();
    let ours = [
        format!("127.0.0.1:{port}"),
        format!("localhost:{port}"),
        "[::1]".to_owned(),
    ];
    for host in &ours {
        assert_eq!(server.get("/", host, "").0, 200, "{host}");
        assert_eq!(server.get("/status", host, "").0, 200, "{host}");
    }
    // A name that resolves to this machine, with and without the page it belongs to.
    for path in ["/", "/status", "/main", "/federated", "/weights/00", "/nothing"] {
        for host in [
            "evil.example",
            &format!("evil.example:{port}"),
            "localhost.evil.example",
        ] {
            let (status, answer) = server.get(path, host, "Origin: http://evil.example\r\n");
            assert_eq!(status, 421, "{path} at {host}: {answer}");
            assert!(answer.contains("--host"), "{answer}");
        }
    }
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: \
                   dGhlIHNhbXBsZSBub25jZQ==\r\nOrigin: http://evil.example\r\n";
    for service in ["main", "federated"] {
        let mut stream = server.connect();
        let request = format!("GET /{service} HTTP/1.1\r\nHost: localhost:{port}\r\n{upgrade}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 403", "{service}");
    }
    for (path, host) in [
        ("/", "localhost"),
        ("/status", "localhost"),
        ("/nothing", "localhost"),
        ("/weights/00", "localhost"),
        ("/", "evil.example"),
    ] {
        let (_, answer) = server.get(path, host, "");
        for guard in GUARDS {
            assert!(answer.contains(guard), "{path} at {host}: {answer}");
        }
    }
}

#[test]
fn weights_are_for_clients_of_the_run() {
    let server = Serving::main(patient());
    let mut member = server.socket("main");
    let welcome = member.join(secret(TOKEN));
    let part = &member.assignment().weights[0];
    let path = format!("/weights/{}", part.sha256);
    let ask = |bearer: &str| server.get(&path, "localhost", bearer).0;
    let show = |ticket: &Ticket| format!("Authorization: Bearer {}\r\n", ticket.to_bearer());
    assert_eq!(ask(""), 401);
    assert_eq!(ask("Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(ask(&format!("Authorization: Bearer {TOKEN}\r\n")), 200);
    assert_eq!(ask(&show(&welcome.ticket)), 200);
    assert_eq!(ask(&show(&welcome.federated_ticket.unwrap())), 401);
    let mut forged = welcome.ticket.clone();
    *forged.0.last_mut().unwrap() ^= 1;
    assert_eq!(ask(&show(&forged)), 401);
}

#[test]
fn tls_is_1_3() {
    let server = Serving::start("https://127.0.0.1:0", Role::Both, Some(main_run()), patient());
    let handshake = |version: &'static rustls::SupportedProtocolVersion| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let error = client.complete_io(&mut server.connect()).unwrap_err();
        error.into_inner().unwrap().downcast::<rustls::Error>().unwrap()
    };
    // With the right version it is the certificate that nobody has signed.
    let unknown = handshake(&rustls::version::TLS13);
    assert!(matches!(*unknown, rustls::Error::InvalidCertificate(_)), "{unknown}");
    let refused = handshake(&rustls::version::TLS12);
    let alert = rustls::Error::AlertReceived(rustls::AlertDescription::ProtocolVersion);
    assert_eq!(*refused, alert);
}

#[test]
fn a_clients_token_is_no_key_to_the_federated_server() {
    let role = Role::Federated {
        control_key: "lighthouse".to_owned(),
        aggregation: None,
    };
    let server = Serving::start("http://127.0.0.1:0", role, None, patient());
    let mut control = server.socket("federated");
    let Some(Answer::Welcome(_)) = control.greet(Service::Control, secret("lighthouse")) else {
        panic!("the main server is not let in");
    };
    for credential in [secret(TOKEN), secret(""), secret("lighthous")] {
        let refused = refusal(server.socket("federated").greet(Service::Control, credential));
        assert_eq!(refused, Some(RefusalReason::SecretWrong));
    }
    let refused = refusal(server.socket("federated").greet(Service::Control, Credential::None));
    assert_eq!(refused, Some(RefusalReason::SecretMissing));
    // The main server's connection is still there: it is pinged.
    assert!(control.hear().is_some());
}

#[test]
fn a_member_that_does_not_read_is_let_go_by_name() {
    let server = Serving::main(patient());
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    // Little fits on the way.
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = server.runtime.block_on(socket.connect(server.address)).unwrap();
    let mut member = server.socket_on("main", stream.into_std().unwrap());
    member.join(secret(TOKEN));
    member.assignment();
    // Each is answered, and no answer is read.
    let ping = encode_frame(Frame::Ping {
        nonce: 1,
        acknowledged: 0,
    });
    let flood = async {
        let mut sent = 0_u32;
        while member.socket.feed(Message::Binary(ping.clone().into())).await.is_ok() {
            sent += 1;
            assert!(sent < 5_000_000, "the server queues without end");
        }
    };
    server
        .runtime
        .block_on(async { tokio::time::timeout(LIMIT, flood).await })
        .expect("the server neither reads nor closes");
    drop(member);
    let metrics = server.stop();
    let left: Vec<&Value> = metrics.iter().filter(|line| line["event"] == "left").collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["name"], "guest");
    assert_eq!(left[0]["reason"], "does not read what it is sent");
}

#[test]
fn whose_bytes_still_come_is_not_silent_however_long_its_frame_takes() {
    let server = Serving::main(patient());
    let mut slow = server.socket("main");
    slow.join(secret(TOKEN));
    // A masked frame of 2,000 bytes, of which two a second come.
    let mut bytes = vec![0x82, 0x80 | 126];
    bytes.extend(2000_u16.to_be_bytes());
    bytes.extend([0; 4]);
    let silence = sflllm::protocol::silence_limit(PING_INTERVAL) + PING_INTERVAL;
    let start = Instant::now();
    while start.elapsed() < silence {
        let stream = slow.socket.get_mut();
        server.runtime.block_on(async {
            use tokio::io::AsyncWriteExt;
            stream.write_all(&bytes).await.unwrap();
        });
        bytes = vec![0];
        // It is the slow line itself: the time between its bytes.
        thread::sleep(Duration::from_millis(500));
    }
    let metrics = server.stop();
    let silent = |line: &&Value| line["event"] == "left" && line["reason"] == DepartureReason::Silent.to_string();
    assert_eq!(metrics.iter().find(silent), None);
}
