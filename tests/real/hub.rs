//! Claims about fetching models: what is asked of a hub, what is kept in the cache, and what is refused how. The hub is
//! a server in this process; its files, and how it misbehaves, are each test's own.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::{Method, Request, Response, StatusCode};
use futures_util::stream;
use serde_json::json;
use sflllm::hub::{Endpoint, Error, Event, Files, Hub, Name, Progress, Settings, Snapshot, Token};
use sha2::{Digest, Sha256};

const COMMIT: &str = "1111111111111111111111111111111111111111";
const OTHER_COMMIT: &str = "2222222222222222222222222222222222222222";
/// Larger than one piece of a transfer.
const WEIGHTS: usize = 1 << 20;

// ---- a hub

/// A request as the server saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    method: Method,
    path: String,
    authorization: Option<String>,
    range: Option<String>,
}

impl Seen {
    fn gets(&self, file: &str) -> bool {
        self.method == Method::GET && self.path.ends_with(file)
    }
}

/// What a file of a repository is.
#[derive(Clone)]
struct Content {
    bytes: Vec<u8>,
    /// SHA-256 of them, in hexadecimal.
    digest: String,
    /// Whether git holds only a pointer to it, whose digest the hub tells.
    large: bool,
}

/// Answers some requests in another way than a hub does.
type Override = Box<dyn Fn(&Seen, usize) -> Option<Answer> + Send + Sync>;

enum Answer {
    Now(Response<Body>),
    Never,
}

struct State {
    /// Commit of each revision.
    revisions: Mutex<BTreeMap<String, String>>,
    /// Of each commit of `a/b`.
    files: Mutex<BTreeMap<(String, String), Content>>,
    /// Names that the listing claims besides.
    claimed: Mutex<Vec<String>>,
    seen: Mutex<Vec<Seen>>,
    overrides: Mutex<Vec<Override>>,
    /// Where large files lie, if not here.
    elsewhere: Mutex<Option<String>>,
}

struct Server {
    state: Arc<State>,
    address: SocketAddr,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    fn empty() -> Self {
        let state = Arc::new(State {
            revisions: Mutex::new(BTreeMap::from([("main".to_owned(), COMMIT.to_owned())])),
            files: Mutex::default(),
            claimed: Mutex::default(),
            seen: Mutex::default(),
            overrides: Mutex::default(),
            elsewhere: Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = state.clone();
        let router = axum::Router::new().fallback(move |request: Request<Body>| answer(shared.clone(), request));
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            state,
            address,
            _runtime: runtime,
        }
    }

    /// `a/b` with safetensors, and much that no model is made of.
    fn new() -> Self {
        let server = Self::empty();
        for (name, text) in [
            ("config.json", "{\"model_type\": \"gpt2\"}"),
            ("tokenizer.json", "{\"version\": \"1.0\"}"),
            ("README.md", "# read me"),
            ("onnx/config.json", "{}"),
        ] {
            server.add(name, text.as_bytes().to_vec(), false);
        }
        server.add("model.safetensors", weights(), true);
        server.add("pytorch_model.bin", weights(), true);
        server
    }

    fn add(&self, name: &str, bytes: Vec<u8>, large: bool) {
        self.add_to(COMMIT, name, bytes, large);
    }

    fn add_to(&self, commit: &str, name: &str, bytes: Vec<u8>, large: bool) {
        let key = (commit.to_owned(), name.to_owned());
        let digest = hex(&bytes);
        let content = Content { bytes, digest, large };
        self.state.files.lock().unwrap().insert(key, content);
    }

    fn remove(&self, name: &str) {
        let key = (COMMIT.to_owned(), name.to_owned());
        self.state.files.lock().unwrap().remove(&key);
    }

    /// `answer` gets how many requests it has been shown before.
    fn instead(&self, answer: impl Fn(&Seen, usize) -> Option<Answer> + Send + Sync + 'static) {
        self.state.overrides.lock().unwrap().push(Box::new(answer));
    }

    /// Answers like this those requests that `is` picks, as often as `times`.
    fn instead_of(
        &self,
        times: usize,
        is: impl Fn(&Seen) -> bool + Send + Sync + 'static,
        answer: impl Fn(&Seen) -> Response<Body> + Send + Sync + 'static,
    ) {
        let count = AtomicUsize::new(0);
        self.instead(move |seen, _| {
            (is(seen) && count.fetch_add(1, Ordering::SeqCst) < times).then(|| Answer::Now(answer(seen)))
        });
    }

    fn as_before(&self) {
        self.state.overrides.lock().unwrap().clear();
    }

    /// Requests since the last call.
    fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.state.seen.lock().unwrap())
    }

    fn endpoint(&self) -> Endpoint {
        format!("http://{}", self.address).parse().unwrap()
    }

    fn settings(&self, cache: &Path) -> Settings {
        let mut settings = Settings::new(self.endpoint(), cache);
        settings.pause = Duration::from_millis(1);
        settings.patience = Duration::from_secs(20);
        settings
    }

    fn hub(&self, cache: &Path) -> Hub {
        Hub::new(self.settings(cache))
    }
}

async fn answer(state: Arc<State>, request: Request<Body>) -> Response<Body> {
    let seen = {
        let header = |name: &str| Some(request.headers().get(name)?.to_str().ok()?.to_owned());
        Seen {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            authorization: header("authorization"),
            range: header("range"),
        }
    };
    let earlier = {
        let mut all = state.seen.lock().unwrap();
        all.push(seen.clone());
        all.len() - 1
    };
    let overridden = {
        let overrides = state.overrides.lock().unwrap();
        overrides.iter().find_map(|answer| answer(&seen, earlier))
    };
    match overridden {
        Some(Answer::Now(response)) => response,
        Some(Answer::Never) => std::future::pending().await,
        None => state.answer(&seen),
    }
}

impl State {
    fn answer(&self, seen: &Seen) -> Response<Body> {
        if let Some(revision) = seen.path.strip_prefix("/api/models/a/b/revision/") {
            let revision = revision.replace("%2F", "/");
            let revisions = self.revisions.lock().unwrap();
            let by_name = revisions.get(&revision);
            return match by_name.or_else(|| revisions.values().find(|commit| **commit == revision)) {
                Some(commit) => self.listing(commit),
                None => refused(404, "RevisionNotFound", "Invalid rev id"),
            };
        }
        let Some((commit, file)) = seen
            .path
            .strip_prefix("/a/b/resolve/")
            .and_then(|rest| rest.split_once('/'))
        else {
            return refused(404, "RepoNotFound", "Repository not found");
        };
        let files = self.files.lock().unwrap();
        let Some(content) = files.get(&(commit.to_owned(), file.to_owned())) else {
            return refused(404, "EntryNotFound", "Entry not found");
        };
        let elsewhere = self.elsewhere.lock().unwrap();
        let mut response = Response::builder().header("x-repo-commit", commit);
        if content.large {
            response = response
                .header("x-linked-etag", format!("\"{}\"", content.digest))
                .header("x-linked-size", content.bytes.len());
            if let Some(elsewhere) = &*elsewhere {
                let location = format!("{elsewhere}{}?Signature=secret", seen.path);
                return response
                    .status(StatusCode::FOUND)
                    .header("location", location)
                    .body(Body::empty())
                    .unwrap();
            }
        }
        response = response.header("etag", format!("\"{}\"", etag(content)));
        if seen.method == Method::HEAD {
            return response
                .header("content-length", content.bytes.len())
                .body(Body::empty())
                .unwrap();
        }
        match seen.range.as_deref().and_then(first_byte) {
            None => response.body(Body::from(content.bytes.clone())).unwrap(),
            Some(first) if first >= content.bytes.len() => refused(416, "", ""),
            Some(first) => response
                .status(StatusCode::PARTIAL_CONTENT)
                .header("content-range", range(first, content.bytes.len()))
                .body(Body::from(content.bytes[first..].to_vec()))
                .unwrap(),
        }
    }

    fn listing(&self, commit: &str) -> Response<Body> {
        let files = self.files.lock().unwrap();
        let mut siblings: Vec<_> = files
            .iter()
            .filter(|((of, _), _)| of == commit)
            .map(|((_, name), content)| {
                let mut sibling = json!({ "rfilename": name, "size": content.bytes.len() });
                if content.large {
                    sibling["lfs"] = json!({ "sha256": content.digest, "size": content.bytes.len() });
                }
                sibling
            })
            .collect();
        siblings.extend(
            self.claimed
                .lock()
                .unwrap()
                .iter()
                .map(|name| json!({ "rfilename": name })),
        );
        let model = json!({ "id": "a/b", "sha": commit, "gated": false, "siblings": siblings });
        Response::new(Body::from(model.to_string()))
    }
}

fn refused(status: u16, code: &str, message: &str) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("x-error-code", code)
        .header("x-error-message", message)
        .body(Body::empty())
        .unwrap()
}

fn status(status: u16) -> Response<Body> {
    Response::builder().status(status).body(Body::empty()).unwrap()
}

/// Says that `bytes` come, sends the first `sent` of them and breaks off.
fn cut(bytes: &[u8], sent: usize) -> Response<Body> {
    let first = Bytes::copy_from_slice(&bytes[..sent]);
    // The pause lets the bytes go out before the connection is closed.
    let pieces = stream::unfold(Some(first), |piece| async move {
        let piece = match piece {
            Some(piece) => Ok(piece),
            None => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("cut"))
            }
        };
        Some((piece, None))
    });
    Response::builder()
        .header("content-length", bytes.len())
        .body(Body::from_stream(pieces))
        .unwrap()
}

fn first_byte(range: &str) -> Option<usize> {
    range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

fn range(first: usize, length: usize) -> String {
    format!("bytes {first}-{}/{length}", length - 1)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A digest as git takes it is 40 digits long; which digest it is matters to nobody.
fn etag(content: &Content) -> &str {
    if content.large {
        &content.digest
    } else {
        &content.digest[..40]
    }
}

fn weights() -> Vec<u8> {
    (0..WEIGHTS).map(|index| (index * index / 7) as u8).collect()
}

// ---- helpers

fn model(text: &str) -> Name {
    text.parse().unwrap()
}

fn quiet(_: Event<'_>) {}

fn fetch(hub: &Hub, name: &str) -> Result<Snapshot, Error> {
    hub.snapshot_blocking(&model(name), &quiet)
}

fn directory(snapshot: &Snapshot) -> PathBuf {
    match &snapshot.files {
        Files::Directory(path) => path.clone(),
        Files::Gguf(path) => panic!("{} is no directory", path.display()),
    }
}

/// Names of everything in a directory, sorted.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn repository(cache: &Path) -> PathBuf {
    cache.join("models--a--b")
}

fn partial(cache: &Path) -> PathBuf {
    repository(cache).join(format!("blobs/{}.incomplete", hex(&weights())))
}

/// Puts the first `length` bytes of the weights where an earlier attempt would have left them.
fn leave_partial(cache: &Path, bytes: &[u8]) {
    let path = partial(cache);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn cache() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn assert_whole(snapshot: &Snapshot) {
    let directory = directory(snapshot);
    assert_eq!(
        names(&directory),
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    assert!(fs::read(directory.join("model.safetensors")).unwrap() == weights());
}

// ---- what is fetched, and how it is kept

#[test]
fn a_model_is_fetched_into_the_layout_of_pythons_cache() {
    let (server, cache) = (Server::new(), cache());
    let snapshot = fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert_eq!(snapshot.commit.as_str(), COMMIT);
    assert_eq!(
        directory(&snapshot),
        repository(cache.path()).join("snapshots").join(COMMIT)
    );
    assert_whole(&snapshot);

    let root = repository(cache.path());
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let mut blobs = vec![hex(&weights())];
    for text in ["{\"model_type\": \"gpt2\"}", "{\"version\": \"1.0\"}"] {
        blobs.push(hex(text.as_bytes())[..40].to_owned());
    }
    blobs.sort();
    assert_eq!(names(&root.join("blobs")), blobs);
    assert_eq!(names(&root), [".no_exist", "blobs", "refs", "snapshots"]);
    let lacking = names(&root.join(".no_exist").join(COMMIT));
    assert_eq!(lacking.len(), 8, "{lacking:?}");
    assert!(lacking.contains(&"model.safetensors.index.json".to_owned()));
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(directory(&snapshot).join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(hex(&weights()))
    );
    assert!(
        server
            .seen()
            .iter()
            .all(|seen| !seen.path.ends_with("pytorch_model.bin"))
    );
}

#[test]
fn a_second_run_asks_nothing() {
    let (server, cache) = (Server::new(), cache());
    let first = fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    server.seen();
    assert_eq!(fetch(&server.hub(cache.path()), "hf:a/b").unwrap(), first);
    assert_eq!(
        fetch(&server.hub(cache.path()), &format!("hf:a/b@{COMMIT}")).unwrap(),
        first
    );
    assert_eq!(server.seen(), []);
}

#[test]
fn progress_adds_up_to_what_was_announced() {
    let (server, cache) = (Server::new(), cache());
    // One cut, one damaged body: what is thrown away is said.
    let bytes = weights();
    server.instead_of(1, |seen| seen.gets("model.safetensors"), {
        let bytes = bytes.clone();
        move |_| cut(&bytes, WEIGHTS / 2)
    });
    server.instead_of(1, |seen| seen.gets("model.safetensors"), {
        move |_| {
            let mut bytes = bytes[WEIGHTS / 2..].to_vec();
            bytes[0] ^= 1;
            Response::builder()
                .status(206)
                .header("content-range", range(WEIGHTS / 2, WEIGHTS))
                .body(Body::from(bytes))
                .unwrap()
        }
    });
    let log = Mutex::new((Vec::new(), 0_i64, 0_i64, 0_u32));
    let progress = |event: Event<'_>| {
        let (groups, announced, arrived, retries) = &mut *log.lock().unwrap();
        match event {
            Event::Fetching { files, bytes } => {
                groups.push(files);
                *announced += bytes as i64;
            }
            Event::File { present, .. } => *arrived += present as i64,
            Event::Received { bytes } => *arrived += bytes as i64,
            Event::Dropped { bytes, .. } => *arrived -= bytes as i64,
            Event::Retrying { .. } => *retries += 1,
            Event::Fetched => assert_eq!(announced, arrived),
            Event::Locked { .. } | Event::Unasked { .. } => panic!("{event:?}"),
        }
    };
    let snapshot = server
        .hub(cache.path())
        .snapshot_blocking(&model("hf:a/b"), &progress)
        .unwrap();
    assert_whole(&snapshot);
    let (groups, announced, _, retries) = log.into_inner().unwrap();
    assert_eq!((groups, retries), (vec![2, 1], 1));
    assert!(announced > WEIGHTS as i64);
}

#[test]
fn shards_are_those_that_the_index_names() {
    let (server, cache) = (Server::new(), cache());
    server.remove("model.safetensors");
    let index =
        json!({ "weight_map": { "x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors" } });
    server.add("model.safetensors.index.json", index.to_string().into_bytes(), false);
    server.add("model-00001-of-00002.safetensors", b"one".to_vec(), true);
    server.add("model-00002-of-00002.safetensors", b"two".to_vec(), true);
    server.add("other.safetensors", b"three".to_vec(), true);
    let snapshot = fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    let expected = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(names(&directory(&snapshot)), expected);
    server.seen();
    fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert_eq!(server.seen(), []);
    // Without one shard it is not a model.
    fs::remove_file(directory(&snapshot).join(expected[1])).unwrap();
    fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert_eq!(names(&directory(&snapshot)), expected);
    let seen = server.seen();
    assert!(
        seen.iter().all(|seen| !seen.gets(expected[1])),
        "its blob is here: {seen:?}"
    );
}

#[test]
fn a_gguf_file_is_taken_alone() {
    let (server, cache) = (Server::empty(), cache());
    server.add("README.md", b"read".to_vec(), false);
    server.add("m-Q4_0.gguf", weights(), true);
    let hub = server.hub(cache.path());
    let path = repository(cache.path())
        .join("snapshots")
        .join(COMMIT)
        .join("m-Q4_0.gguf");
    assert_eq!(fetch(&hub, "hf:a/b").unwrap().files, Files::Gguf(path.clone()));
    server.seen();
    assert_eq!(fetch(&hub, "hf:a/b").unwrap().files, Files::Gguf(path));
    assert_eq!(server.seen(), []);
}

#[test]
fn of_several_gguf_files_one_is_named() {
    let (server, cache) = (Server::new(), cache());
    server.remove("model.safetensors");
    server.add("q/m-Q8_0.gguf", b"eight".to_vec(), true);
    server.add("m-Q4_0.gguf", b"four".to_vec(), true);
    let hub = server.hub(cache.path());
    let error = fetch(&hub, "hf:a/b").unwrap_err().to_string();
    assert!(error.contains("hf:a/b:FILE, of m-Q4_0.gguf, q/m-Q8_0.gguf"), "{error}");
    let error = fetch(&hub, "hf:a/b:m-Q5_0.gguf").unwrap_err().to_string();
    assert!(
        error.contains("no file m-Q5_0.gguf") && error.contains("m-Q4_0.gguf"),
        "{error}"
    );
    let snapshot = fetch(&hub, "hf:a/b:q/m-Q8_0.gguf").unwrap();
    let Files::Gguf(path) = snapshot.files else { panic!() };
    assert!(path.ends_with("q/m-Q8_0.gguf"));
    assert_eq!(fs::read(path).unwrap(), b"eight");
    server.seen();
    fetch(&hub, "hf:a/b:q/m-Q8_0.gguf").unwrap();
    assert_eq!(server.seen(), []);
}

#[test]
fn a_revision_is_pinned_and_another_one_found_beside_it() {
    let (server, cache) = (Server::new(), cache());
    server.add_to(OTHER_COMMIT, "config.json", b"{}".to_vec(), false);
    server.add_to(OTHER_COMMIT, "model.safetensors", weights(), true);
    let mut revisions = server.state.revisions.lock().unwrap();
    revisions.insert("v1".to_owned(), OTHER_COMMIT.to_owned());
    revisions.insert("refs/pr/1".to_owned(), OTHER_COMMIT.to_owned());
    drop(revisions);
    let hub = server.hub(cache.path());
    assert_eq!(fetch(&hub, "hf:a/b").unwrap().commit.as_str(), COMMIT);
    server.seen();
    let root = repository(cache.path());
    for revision in ["v1", "refs/pr/1", OTHER_COMMIT] {
        let snapshot = fetch(&hub, &format!("hf:a/b@{revision}")).unwrap();
        assert_eq!(snapshot.commit.as_str(), OTHER_COMMIT);
        assert_eq!(names(&directory(&snapshot)), ["config.json", "model.safetensors"]);
    }
    assert!(
        server.seen().iter().all(|seen| !seen.gets("model.safetensors")),
        "same content"
    );
    assert_eq!(fs::read_to_string(root.join("refs/v1")).unwrap(), OTHER_COMMIT);
    assert_eq!(fs::read_to_string(root.join("refs/refs/pr/1")).unwrap(), OTHER_COMMIT);
    assert!(!root.join("refs").join(OTHER_COMMIT).exists());
    // The branch has moved; what is here stays until someone asks for more.
    let mut revisions = server.state.revisions.lock().unwrap();
    revisions.insert("main".to_owned(), OTHER_COMMIT.to_owned());
    drop(revisions);
    assert_eq!(fetch(&hub, "hf:a/b").unwrap().commit.as_str(), COMMIT);
    fs::remove_file(root.join("refs/main")).unwrap();
    assert_eq!(fetch(&hub, "hf:a/b").unwrap().commit.as_str(), OTHER_COMMIT);
}

#[test]
fn a_branch_is_followed_only_to_where_all_of_it_is_here() {
    let (server, cache) = (Server::new(), cache());
    let hub = server.hub(cache.path());
    let first = fetch(&hub, "hf:a/b").unwrap();
    // Something that is not known to be lacking makes it ask.
    let unknown = repository(cache.path())
        .join(".no_exist")
        .join(COMMIT)
        .join("merges.txt");
    fs::remove_file(unknown).unwrap();
    server.add_to(OTHER_COMMIT, "config.json", b"{}".to_vec(), false);
    server.add_to(OTHER_COMMIT, "model.safetensors", b"new".to_vec(), true);
    let mut revisions = server.state.revisions.lock().unwrap();
    revisions.insert("main".to_owned(), OTHER_COMMIT.to_owned());
    drop(revisions);
    server.instead_of(usize::MAX, |seen| seen.gets("model.safetensors"), |_| status(500));
    fetch(&hub, "hf:a/b").unwrap_err();
    let mut settings = server.settings(cache.path());
    settings.offline = true;
    assert_eq!(fetch(&Hub::new(settings), "hf:a/b").unwrap(), first);
}

/// A cache as Python's huggingface_hub leaves it: only what was asked for, and notes of what was looked for in vain.
fn python_cache(cache: &Path, beside: &[&str]) {
    let root = repository(cache);
    for directory in ["blobs", "refs", "snapshots", ".no_exist"] {
        let below = if directory == "snapshots" || directory == ".no_exist" {
            COMMIT
        } else {
            ""
        };
        fs::create_dir_all(root.join(directory).join(below)).unwrap();
    }
    fs::write(root.join("refs/main"), COMMIT).unwrap();
    let mut files = vec![("config.json", b"{}".to_vec()), ("model.safetensors", weights())];
    files.extend(beside.iter().map(|name| (*name, b"{}".to_vec())));
    for (name, bytes) in files {
        let blob = hex(&bytes);
        fs::write(root.join("blobs").join(&blob), &bytes).unwrap();
        let path = root.join("snapshots").join(COMMIT).join(name);
        #[cfg(unix)]
        std::os::unix::fs::symlink(Path::new("../../blobs").join(&blob), path).unwrap();
        #[cfg(not(unix))]
        fs::write(path, &bytes).unwrap();
    }
    for lacking in ["added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"] {
        fs::write(root.join(".no_exist").join(COMMIT).join(lacking), "").unwrap();
    }
}

const PYTHON_BESIDE: [&str; 4] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
];

#[test]
fn what_python_cached_is_found_without_asking() {
    let (server, cache) = (Server::new(), cache());
    python_cache(cache.path(), &PYTHON_BESIDE);
    let snapshot = fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert_eq!(snapshot.commit.as_str(), COMMIT);
    assert_eq!(names(&directory(&snapshot)).len(), 6);
    assert_eq!(server.seen(), []);
}

#[test]
fn what_python_did_not_look_for_is_fetched_beside_what_it_did() {
    let (server, cache) = (Server::new(), cache());
    python_cache(cache.path(), &[]);
    let snapshot = fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert_whole(&snapshot);
    let seen = server.seen();
    let got: Vec<&str> = seen
        .iter()
        .filter(|seen| seen.method == Method::GET)
        .map(|seen| &*seen.path)
        .collect();
    assert_eq!(
        got,
        [
            "/api/models/a/b/revision/main",
            &format!("/a/b/resolve/{COMMIT}/tokenizer.json")
        ]
    );
}

// ---- offline, and hubs that do not answer

#[test]
fn offline_the_cache_is_all_there_is() {
    let (server, cache) = (Server::new(), cache());
    let mut settings = server.settings(cache.path());
    settings.offline = true;
    let offline = Hub::new(settings);
    let error = fetch(&offline, "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Offline { .. }));
    let text = error.to_string();
    assert!(
        text.contains("hf:a/b") && text.contains(cache.path().to_str().unwrap()),
        "{text}"
    );

    fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    server.seen();
    assert_whole(&fetch(&offline, "hf:a/b").unwrap());
    assert!(matches!(fetch(&offline, "hf:a/b@v1"), Err(Error::Offline { .. })));
    assert!(matches!(fetch(&offline, "hf:a/b:m.gguf"), Err(Error::Offline { .. })));
    // What nobody looked for does not matter where nobody can look.
    fs::remove_dir_all(repository(cache.path()).join(".no_exist")).unwrap();
    assert_whole(&fetch(&offline, "hf:a/b").unwrap());
    fs::remove_file(repository(cache.path()).join("blobs").join(hex(&weights()))).unwrap();
    assert!(matches!(fetch(&offline, "hf:a/b"), Err(Error::Offline { .. })));
    assert_eq!(server.seen(), []);
}

#[test]
fn a_description_is_the_config_alone_and_is_asked_for_once() {
    let (server, cache) = (Server::new(), cache());
    let hub = server.hub(cache.path());
    let described = hub.description_blocking(&model("hf:a/b"), &quiet).unwrap();
    assert_eq!(names(&described), ["config.json"]);
    let fetched: Vec<Seen> = (server.seen().into_iter())
        .filter(|seen| seen.path.contains("/resolve/"))
        .collect();
    assert!(
        fetched.iter().all(|seen| seen.path.ends_with("/config.json")),
        "{fetched:?}"
    );
    // A commit that is named is here; of a branch nobody knows where it is now, and it is not said to be here as a whole.
    let pinned = model(&format!("hf:a/b@{COMMIT}"));
    assert_eq!(hub.description_blocking(&pinned, &quiet).unwrap(), described);
    assert_eq!(server.seen(), []);
    assert_whole(&fetch(&hub, "hf:a/b").unwrap());
    server.seen();
    assert_eq!(hub.description_blocking(&model("hf:a/b"), &quiet).unwrap(), described);
    assert_eq!(server.seen(), []);
}

#[test]
fn a_description_that_cannot_be_is_refused() {
    let (server, cache) = (Server::new(), cache());
    let mut settings = server.settings(cache.path());
    settings.offline = true;
    let offline = Hub::new(settings).description_blocking(&model("hf:a/b"), &quiet);
    assert!(matches!(offline, Err(Error::Offline { .. })));
    server.remove("config.json");
    let absent = server.hub(cache.path()).description_blocking(&model("hf:a/b"), &quiet);
    assert!(matches!(absent, Err(Error::NoConfig { .. })), "{absent:?}");
}

/// An address at which nothing listens.
fn nowhere() -> Endpoint {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap()).parse().unwrap()
}

#[test]
fn without_a_network_it_says_so_at_once_and_takes_what_is_here() {
    let cache = cache();
    let mut settings = Settings::new(nowhere(), cache.path());
    settings.pause = Duration::from_secs(60);
    let hub = Hub::new(settings);
    let start = Instant::now();
    let error = fetch(&hub, "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::NoConnection { .. }), "{error}");
    assert!(error.to_string().contains("HTTPS_PROXY"), "{error}");

    python_cache(cache.path(), &[]);
    let unasked = Mutex::new(0);
    let progress = |event: Event<'_>| match event {
        Event::Unasked { reason } => {
            assert!(matches!(reason, Error::NoConnection { .. }));
            *unasked.lock().unwrap() += 1;
        }
        other => panic!("{other:?}"),
    };
    let snapshot = hub.snapshot_blocking(&model("hf:a/b"), &progress).unwrap();
    assert_eq!(snapshot.commit.as_str(), COMMIT);
    assert_eq!(*unasked.lock().unwrap(), 1);
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_certificate_that_nobody_trusts_is_named_as_the_cause() {
    let issued = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(issued.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key.into())
        .unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("https://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut connection = rustls::ServerConnection::new(Arc::new(tls)).unwrap();
        // It ends when the client refuses.
        while connection.is_handshaking() && connection.complete_io(&mut socket).is_ok() {}
    });
    let cache = cache();
    let settings = Settings::new(endpoint.parse().unwrap(), cache.path());
    let error = fetch(&Hub::new(settings), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Certificate { .. }), "{error}");
    assert!(error.to_string().contains("signed by nobody trusted here"), "{error}");
    server.join().unwrap();
}

#[test]
fn a_failing_server_is_asked_again_a_bounded_number_of_times() {
    let (server, cache) = (Server::new(), cache());
    server.instead_of(4, |seen| seen.path.starts_with("/api/"), |_| status(503));
    server.instead_of(2, |seen| seen.method == Method::HEAD, |_| status(429));
    server.instead_of(2, |seen| seen.gets("model.safetensors"), |_| status(502));
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
    server.as_before();
    server.seen();
    server.instead_of(usize::MAX, |_| true, |_| status(503));
    let error = fetch(&server.hub(cache.path()), "hf:a/b@v2").unwrap_err();
    assert!(matches!(error, Error::Status { status: 503, .. }), "{error}");
    assert_eq!(server.seen().len(), 5);
}

#[test]
fn a_server_that_asks_for_a_pause_gets_it() {
    let (server, cache) = (Server::new(), cache());
    server.instead_of(
        1,
        |_| true,
        |_| {
            Response::builder()
                .status(429)
                .header("retry-after", "1")
                .body(Body::empty())
                .unwrap()
        },
    );
    let start = Instant::now();
    fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[test]
fn a_silent_server_is_not_waited_for_forever() {
    let (server, cache) = (Server::new(), cache());
    server.instead(|_, _| Some(Answer::Never));
    let mut settings = server.settings(cache.path());
    settings.patience = Duration::from_millis(100);
    let error = fetch(&Hub::new(settings), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Silent { .. }), "{error}");
    assert_eq!(server.seen().len(), 5);
}

#[test]
fn silence_in_the_middle_of_a_file_is_a_broken_connection() {
    let (server, cache) = (Server::new(), cache());
    server.instead_of(
        1,
        |seen| seen.gets("model.safetensors"),
        |_| {
            let first = Bytes::from(weights()[..1000].to_vec());
            let pieces = stream::unfold(Some(first), |piece| async move {
                match piece {
                    Some(piece) => Some((Ok::<_, std::io::Error>(piece), None)),
                    None => std::future::pending().await,
                }
            });
            Response::builder()
                .header("content-length", WEIGHTS)
                .body(Body::from_stream(pieces))
                .unwrap()
        },
    );
    let mut settings = server.settings(cache.path());
    settings.patience = Duration::from_millis(500);
    assert_whole(&fetch(&Hub::new(settings), "hf:a/b").unwrap());
    let ranges: Vec<_> = server
        .seen()
        .into_iter()
        .filter(|seen| seen.gets("model.safetensors"))
        .collect();
    assert_eq!(ranges.last().unwrap().range.as_deref(), Some("bytes=1000-"));
}

#[test]
fn a_page_that_is_no_hub_is_recognised() {
    let (server, cache) = (Server::new(), cache());
    for body in [
        "<html>Log in to the network</html>",
        "{}",
        "{\"sha\": \"../../../etc\", \"siblings\": []}",
        "{\"sha\": 5}",
    ] {
        server.as_before();
        server.instead_of(1, |_| true, move |_| Response::new(Body::from(body)));
        let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{body}: {error}");
        assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");
    }
}

// ---- who may read what

fn with_token(server: &Server, cache: &Path) -> Hub {
    let mut settings = server.settings(cache);
    settings.token = Token::parse("hf_secret", "HF_TOKEN").unwrap();
    Hub::new(settings)
}

#[test]
fn a_model_that_is_private_or_absent_is_said_to_be_either() {
    let (server, cache) = (Server::new(), cache());
    server.instead_of(
        usize::MAX,
        |_| true,
        |_| refused(401, "", "Invalid username or password."),
    );
    let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err().to_string();
    assert!(
        error.contains("no public model a/b") && error.contains("HF_TOKEN"),
        "{error}"
    );
    let error = fetch(&with_token(&server, cache.path()), "hf:a/b")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("does not let this token read a/b: Invalid username or password"),
        "{error}"
    );
    assert!(!error.contains("hf_secret"), "{error}");
    assert_eq!(server.seen().len(), 2, "a refusal is not asked for twice");
}

#[test]
fn a_gated_model_says_where_its_terms_are_accepted() {
    let (server, cache) = (Server::new(), cache());
    // The listing of a gated model is public.
    server.instead_of(
        usize::MAX,
        |seen| seen.method == Method::HEAD,
        |_| refused(403, "GatedRepo", "Access to model a/b is restricted"),
    );
    for hub in [server.hub(cache.path()), with_token(&server, cache.path())] {
        let error = fetch(&hub, "hf:a/b").unwrap_err();
        assert!(matches!(error, Error::Gated { .. }));
        let text = error.to_string();
        assert!(
            text.contains(&format!("accept its terms at {}/a/b", server.endpoint())),
            "{text}"
        );
        assert!(text.contains("token"), "{text}");
    }
    server.as_before();
    server.instead_of(1, |_| true, |_| refused(403, "", "the token lacks a right"));
    let error = fetch(&with_token(&server, cache.path()), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Forbidden { .. }), "{error}");
}

#[test]
fn a_missing_repository_revision_and_file_are_told_apart() {
    let (server, cache) = (Server::new(), cache());
    let hub = server.hub(cache.path());
    let error = fetch(&hub, "hf:a/c").unwrap_err();
    assert!(matches!(error, Error::NoRepository { .. }), "{error}");
    let error = fetch(&hub, "hf:a/b@v9").unwrap_err();
    assert!(
        matches!(&error, Error::NoRevision { revision, .. } if revision == "v9"),
        "{error}"
    );
    server.state.claimed.lock().unwrap().push("vocab.json".to_owned());
    let error = fetch(&hub, "hf:a/b").unwrap_err();
    assert!(
        matches!(&error, Error::NoFile { file, .. } if file == "vocab.json"),
        "{error}"
    );
    assert!(!repository(cache.path()).join("refs").exists());
    server.remove("config.json");
    assert!(matches!(fetch(&hub, "hf:a/b"), Err(Error::NoConfig { .. })));
    server.remove("model.safetensors");
    let error = fetch(&hub, "hf:a/b").unwrap_err().to_string();
    assert!(error.contains("it has pytorch_model.bin"), "{error}");
}

#[test]
fn the_token_is_for_the_hub_and_nobody_else() {
    let (server, storage, cache) = (Server::new(), Server::new(), cache());
    *server.state.elsewhere.lock().unwrap() = Some(format!("http://{}", storage.address));
    assert_whole(&fetch(&with_token(&server, cache.path()), "hf:a/b").unwrap());
    assert!(
        server
            .seen()
            .iter()
            .all(|seen| seen.authorization.as_deref() == Some("Bearer hf_secret"))
    );
    let elsewhere = storage.seen();
    assert_eq!(elsewhere.len(), 1, "{elsewhere:?}");
    assert!(elsewhere[0].gets("model.safetensors") && elsewhere[0].authorization.is_none());
}

#[test]
fn a_resumed_file_is_asked_for_where_it_lies() {
    let (server, storage, cache) = (Server::new(), Server::new(), cache());
    *server.state.elsewhere.lock().unwrap() = Some(format!("http://{}", storage.address));
    leave_partial(cache.path(), &weights()[..WEIGHTS / 3]);
    assert_whole(&fetch(&with_token(&server, cache.path()), "hf:a/b").unwrap());
    let seen = storage.seen();
    assert_eq!(seen[0].range, Some(format!("bytes={}-", WEIGHTS / 3)));
    assert_eq!(seen[0].authorization, None);
}

#[test]
fn a_renamed_repository_is_followed_with_the_token() {
    let (server, cache) = (Server::new(), cache());
    server.instead(|seen, _| {
        let path = seen.path.replace("/old/name/", "/a/b/");
        (path != seen.path).then(|| {
            let response = Response::builder().status(307).header("location", path);
            Answer::Now(response.body(Body::empty()).unwrap())
        })
    });
    let snapshot = fetch(&with_token(&server, cache.path()), "hf:old/name").unwrap();
    assert_eq!(
        directory(&snapshot),
        cache.path().join("models--old--name/snapshots").join(COMMIT)
    );
    assert!(fs::read(directory(&snapshot).join("model.safetensors")).unwrap() == weights());
    assert!(server.seen().iter().all(|seen| seen.authorization.is_some()));
}

#[test]
fn redirects_in_a_circle_and_to_other_schemes_are_refused() {
    let (server, cache) = (Server::new(), cache());
    let location = Arc::new(Mutex::new(String::new()));
    let redirect = location.clone();
    server.instead_of(
        usize::MAX,
        |_| true,
        move |_| {
            let response = Response::builder().status(302);
            response
                .header("location", &*redirect.lock().unwrap())
                .body(Body::empty())
                .unwrap()
        },
    );
    for (to, reason) in [
        ("/api/models/a/b/revision/main", "one redirect after another"),
        ("file:///etc/passwd", "not encrypted"),
        ("ftp://127.0.0.1/x", "not encrypted"),
        ("", "one redirect after another"),
    ] {
        *location.lock().unwrap() = to.to_owned();
        let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err().to_string();
        assert!(error.contains(reason), "{to}: {error}");
    }
}

#[test]
fn what_a_storage_host_refuses_says_nothing_of_the_model() {
    let (server, storage, cache) = (Server::new(), Server::new(), cache());
    *server.state.elsewhere.lock().unwrap() = Some(format!("http://{}", storage.address));
    for code in [401, 403, 404] {
        storage.as_before();
        storage.instead_of(usize::MAX, |_| true, move |_| status(code));
        let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Status { status, .. } if status == code),
            "{text}"
        );
        assert!(
            text.contains(&storage.address.to_string()) && !text.contains("secret"),
            "{text}"
        );
    }
}

// ---- files that arrive in pieces, or not as they were sent

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let (server, cache) = (Server::new(), cache());
    let bytes = weights();
    server.instead_of(
        1,
        |seen| seen.gets("model.safetensors"),
        move |_| cut(&bytes, WEIGHTS / 2),
    );
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
    let ranges: Vec<_> = server
        .seen()
        .into_iter()
        .filter(|seen| seen.gets("model.safetensors"))
        .map(|seen| seen.range)
        .collect();
    assert_eq!(ranges, [None, Some(format!("bytes={}-", WEIGHTS / 2))]);
    assert!(!partial(cache.path()).exists());
}

#[test]
fn the_next_run_goes_on_where_the_last_one_stopped() {
    let (server, cache) = (Server::new(), cache());
    let bytes = weights();
    server.instead_of(
        1,
        |seen| seen.gets("model.safetensors"),
        move |_| cut(&bytes, WEIGHTS / 2),
    );
    server.instead_of(usize::MAX, |seen| seen.gets("model.safetensors"), |_| status(503));
    let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Unfinished { .. }), "{error}");
    assert!(error.to_string().contains("524 kB of 1.0 MB arrived"), "{error}");
    assert!(fs::read(partial(cache.path())).unwrap() == weights()[..WEIGHTS / 2]);
    server.as_before();
    server.seen();
    let present = Mutex::new(0);
    let progress = |event: Event<'_>| {
        if let Event::File { file, present: here } = event
            && file.as_str() == "model.safetensors"
        {
            *present.lock().unwrap() = here;
        }
    };
    let snapshot = server
        .hub(cache.path())
        .snapshot_blocking(&model("hf:a/b"), &progress)
        .unwrap();
    assert_whole(&snapshot);
    assert_eq!(*present.lock().unwrap(), WEIGHTS as u64 / 2);
    let range = server
        .seen()
        .into_iter()
        .find(|seen| seen.gets("model.safetensors"))
        .unwrap()
        .range;
    assert_eq!(range, Some(format!("bytes={}-", WEIGHTS / 2)));
}

#[test]
fn a_file_that_has_arrived_but_was_not_named_needs_no_request() {
    let (server, cache) = (Server::new(), cache());
    leave_partial(cache.path(), &weights());
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
    assert!(server.seen().iter().all(|seen| !seen.gets("model.safetensors")));
}

#[test]
fn a_server_without_ranges_sends_all_of_it_again() {
    let (server, cache) = (Server::new(), cache());
    leave_partial(cache.path(), &weights()[..1000]);
    server.instead_of(1, |seen| seen.range.is_some(), |_| Response::new(Body::from(weights())));
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
}

#[test]
fn a_part_that_was_not_asked_for_is_not_taken() {
    for content_range in [
        Some(range(999, WEIGHTS)),
        Some(range(1000, WEIGHTS + 1)),
        Some(format!("bytes 1000-{}/{WEIGHTS}", WEIGHTS - 2)),
        Some("bytes */5".to_owned()),
        None,
    ] {
        let (server, cache) = (Server::new(), cache());
        leave_partial(cache.path(), &weights()[..1000]);
        let header = content_range.clone();
        server.instead_of(
            1,
            |seen| seen.range.is_some(),
            move |_| {
                let mut response = Response::builder().status(206);
                if let Some(header) = &header {
                    response = response.header("content-range", header);
                }
                response.body(Body::from(weights()[1000..].to_vec())).unwrap()
            },
        );
        let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{content_range:?}: {error}");
        assert!(fs::read(partial(cache.path())).unwrap() == weights()[..1000]);
    }
}

#[test]
fn what_lies_here_and_is_no_part_of_the_file_is_dropped() {
    let (server, cache) = (Server::new(), cache());
    // Longer than the file; as long, and another; a beginning of something else.
    let mut other = weights();
    other[5] ^= 1;
    for left in [vec![0; WEIGHTS + 1], other.clone(), other[..1000].to_vec()] {
        let cache = tempfile::tempdir_in(cache.path()).unwrap();
        leave_partial(cache.path(), &left);
        assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
    }
    // A server that counts otherwise says that there is nothing from there on.
    leave_partial(cache.path(), &weights()[..1000]);
    server.instead_of(1, |seen| seen.range.is_some(), |_| status(416));
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
}

#[test]
fn a_damaged_file_is_fetched_once_more_and_then_refused() {
    let (server, cache) = (Server::new(), cache());
    let damaged = |_: &Seen| {
        let mut bytes = weights();
        bytes[WEIGHTS - 1] ^= 0x80;
        Response::new(Body::from(bytes))
    };
    server.instead_of(2, |seen| seen.gets("model.safetensors"), damaged);
    let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    let root = repository(cache.path());
    assert!(!root.join("snapshots").join(COMMIT).join("model.safetensors").exists());
    assert_eq!(names(&root.join("blobs")).len(), 2, "config and tokenizer");
    let gets = server.seen().into_iter().filter(|seen| seen.gets("model.safetensors"));
    assert_eq!(gets.count(), 2);

    server.as_before();
    server.instead_of(1, |seen| seen.gets("model.safetensors"), damaged);
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
}

#[test]
fn a_blob_of_another_length_is_fetched_again() {
    let (server, cache) = (Server::new(), cache());
    let blob = repository(cache.path()).join("blobs").join(hex(&weights()));
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    fs::write(&blob, &weights()[..1000]).unwrap();
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
}

#[test]
fn sizes_that_no_file_has_are_refused_before_anything_is_written() {
    for (file, bytes) in [
        ("model.safetensors", "1099511627777"),
        ("model.safetensors", "18446744073709551615"),
        ("tokenizer.json", "268435457"),
    ] {
        let (server, cache) = (Server::new(), cache());
        server.instead_of(
            1,
            move |seen| seen.method == Method::HEAD && seen.path.ends_with(file),
            move |_| {
                let response = Response::builder()
                    .header("etag", "\"e\"")
                    .header("x-repo-commit", COMMIT);
                response.header("x-linked-size", bytes).body(Body::empty()).unwrap()
            },
        );
        let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{file} {bytes}: {error}");
        assert!(server.seen().iter().all(|seen| !seen.gets(file)));
    }
}

#[test]
fn a_file_is_as_long_as_it_was_said_to_be() {
    // Told beforehand, told nowhere, and not the end of it.
    let longer = |_: &Seen| Response::new(Body::from([weights(), vec![0]].concat()));
    let endless = |_: &Seen| {
        let pieces = stream::unfold((), |()| async {
            Some((Ok::<_, std::io::Error>(Bytes::from(weights())), ()))
        });
        Response::new(Body::from_stream(pieces))
    };
    let (server, cache) = (Server::new(), cache());
    server.instead_of(1, |seen| seen.gets("model.safetensors"), longer);
    let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Answer { .. }), "{error}");
    server.as_before();
    server.instead_of(1, |seen| seen.gets("model.safetensors"), endless);
    let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert_eq!(fs::metadata(partial(cache.path())).unwrap().len(), 0);
    server.as_before();
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
}

#[test]
fn a_file_without_a_length_is_read_to_its_end() {
    let (server, cache) = (Server::new(), cache());
    let text = b"{\"a\": 1}";
    server.instead_of(
        1,
        |seen| seen.method == Method::HEAD && seen.path.ends_with("vocab.json"),
        |_| {
            Response::builder()
                .header("etag", "W/\"v-1\"")
                .body(Body::from_stream(stream::empty::<Result<Bytes, std::io::Error>>()))
                .unwrap()
        },
    );
    server.instead_of(
        1,
        |seen| seen.gets("vocab.json"),
        |_| {
            let pieces = stream::iter([
                Ok::<_, std::io::Error>(Bytes::from(&text[..3])),
                Ok(Bytes::from(&text[3..])),
            ]);
            Response::new(Body::from_stream(pieces))
        },
    );
    server.state.claimed.lock().unwrap().push("vocab.json".to_owned());
    let snapshot = fetch(&server.hub(cache.path()), "hf:a/b").unwrap();
    assert_eq!(fs::read(directory(&snapshot).join("vocab.json")).unwrap(), text);
    assert!(repository(cache.path()).join("blobs/v-1").exists());
}

#[test]
fn a_file_of_another_commit_or_without_a_usable_etag_is_refused() {
    let (server, cache) = (Server::new(), cache());
    for (name, value) in [
        ("x-repo-commit", OTHER_COMMIT),
        ("etag", "\"../../evil\""),
        ("etag", "\"\""),
    ] {
        server.as_before();
        server.instead_of(
            1,
            |seen| seen.method == Method::HEAD,
            move |_| {
                let mut response = Response::builder().header("content-length", 5);
                if name != "etag" {
                    response = response.header("etag", "\"e\"");
                }
                response.header(name, value).body(Body::empty()).unwrap()
            },
        );
        let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
        assert!(matches!(error, Error::Answer { .. }), "{name} {value}: {error}");
    }
}

#[test]
fn names_that_leave_the_snapshot_are_never_written() {
    let (server, cache) = (Server::new(), cache());
    let inner = cache.path().join("x/y/z/hub");
    let claimed = [
        "../../../../evil.safetensors",
        "/etc/evil.gguf",
        "..\\evil.gguf",
        "C:evil.gguf",
        "a/../../evil.gguf",
    ];
    *server.state.claimed.lock().unwrap() = claimed.map(str::to_owned).to_vec();
    assert_whole(&fetch(&server.hub(&inner), "hf:a/b").unwrap());
    for name in [
        "hf:a/b:../../../../evil.gguf",
        "hf:a/b:/etc/evil.gguf",
        "hf:../..",
        "hf:a/b@../../x",
    ] {
        assert!(name.parse::<Name>().is_err(), "{name}");
    }
    server.remove("model.safetensors");
    let index = json!({ "weight_map": { "x": "../../../../evil.safetensors" } });
    server.add("model.safetensors.index.json", index.to_string().into_bytes(), false);
    fs::remove_dir_all(&inner).unwrap();
    let error = fetch(&server.hub(&inner), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::Index { .. }), "{error}");
    assert_eq!(names(cache.path()), ["x"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_says_how_much_is_missing_and_where() {
    let (server, cache) = (Server::new(), cache());
    let path = partial(cache.path());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let error = fetch(&server.hub(cache.path()), "hf:a/b").unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("1.0 MB more are needed for model.safetensors"), "{text}");
    assert!(text.contains(path.parent().unwrap().to_str().unwrap()), "{text}");
}

#[test]
fn two_at_once_fetch_every_file_once() {
    let (server, cache) = (Server::new(), cache());
    let barrier = std::sync::Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let hub = server.hub(cache.path());
                barrier.wait();
                assert_whole(&fetch(&hub, "hf:a/b").unwrap());
            });
        }
    });
    let gets = |file: &str| {
        server
            .state
            .seen
            .lock()
            .unwrap()
            .iter()
            .filter(|seen| seen.gets(file))
            .count()
    };
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        assert_eq!(gets(file), 1, "{file}");
    }
    assert_eq!(names(&repository(cache.path()).join("blobs")).len(), 3);
}

#[test]
fn whoever_waits_for_another_is_told_so() {
    let (server, cache) = (Server::new(), cache());
    let lock = cache
        .path()
        .join(".locks/models--a--b")
        .join(format!("{}.lock", hex(&weights())));
    fs::create_dir_all(lock.parent().unwrap()).unwrap();
    let file = fs::File::create(&lock).unwrap();
    file.lock().unwrap();
    let held = Mutex::new(Some(file));
    let progress = |event: Event<'_>| {
        if let Event::Locked { file } = event {
            assert_eq!(file.as_str(), "model.safetensors");
            held.lock().unwrap().take().expect("said once");
        }
    };
    let snapshot = server
        .hub(cache.path())
        .snapshot_blocking(&model("hf:a/b"), &progress)
        .unwrap();
    assert_whole(&snapshot);
    assert!(held.lock().unwrap().is_none());
}

#[test]
fn progress_can_be_any_type_that_listens() {
    struct Counter(AtomicUsize);
    impl Progress for Counter {
        fn report(&self, _: Event<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (server, cache) = (Server::new(), cache());
    let counter = Counter(AtomicUsize::new(0));
    server
        .hub(cache.path())
        .snapshot_blocking(&model("hf:a/b"), &counter)
        .unwrap();
    assert!(counter.0.load(Ordering::Relaxed) > 5);
}

// ---- the command line

/// `sflllm eval` of a few lines, which asks this server and keeps what it fetches in `cache`.
fn eval(server: &Server, cache: &Path, model: &str) -> Command {
    let data = cache.join("data.txt");
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    let text = fs::read_to_string(assets.join("test.txt")).unwrap();
    fs::write(
        &data,
        text.lines().take(4).map(|line| format!("{line}\n")).collect::<String>(),
    )
    .unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sflllm"));
    for name in [
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_TOKEN_PATH",
    ] {
        command.env_remove(name);
    }
    command
        .env("HF_ENDPOINT", server.endpoint().as_str())
        .env("HF_HOME", cache)
        .env("HF_HUB_CACHE", cache)
        .args(["eval", "--device", "cpu", "--json", "--model", model, "--data"])
        .arg(&data);
    command
}

/// Exit code, stdout and stderr.
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_command_takes_a_model_by_its_name() {
    let (server, cache) = (Server::empty(), cache());
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    for (name, large) in [
        ("config.json", false),
        ("tokenizer.json", false),
        ("model.safetensors", true),
    ] {
        server.add(name, fs::read(assets.join(name)).unwrap(), large);
    }
    let (_, expected, _) = run(&mut eval(&server, cache.path(), "demo"));
    for _ in 0..2 {
        let (code, stdout, stderr) = run(&mut eval(&server, cache.path(), "hf:a/b"));
        assert_eq!((code, stdout), (Some(0), expected.clone()), "{stderr}");
    }
    assert_eq!(
        server
            .seen()
            .iter()
            .filter(|seen| seen.gets("model.safetensors"))
            .count(),
        1
    );
}

#[test]
fn a_command_that_finds_no_model_says_what_to_do() {
    let (server, cache) = (Server::new(), cache());
    let eval = |model: &str, variable: (&str, &str)| {
        let (code, stdout, stderr) = run(eval(&server, cache.path(), model).env(variable.0, variable.1));
        assert_eq!(stdout, "");
        (code, stderr)
    };
    let nothing = ("UNUSED", "");
    for (model, variable, code, expected) in [
        ("hf:../x", nothing, 2, "names no model on the hub"),
        ("no-such/model", nothing, 1, "did you mean hf:no-such/model"),
        ("hf:a/c", nothing, 1, "there is no model a/c at http://127.0.0.1"),
        ("hf:a/b@v9", nothing, 1, "no revision `v9`"),
        (
            "hf:a/b",
            ("HF_HUB_OFFLINE", "1"),
            1,
            "HF_HUB_OFFLINE is set, and hf:a/b is not in the cache",
        ),
        (
            "hf:a/b",
            ("HF_ENDPOINT", "ftp://mirror"),
            1,
            "HF_ENDPOINT: it begins with neither https:// nor http://",
        ),
        (
            "hf:a/b",
            ("HF_ENDPOINT", nowhere().as_str()),
            1,
            "cannot reach http://127.0.0.1",
        ),
    ] {
        let (found, stderr) = eval(model, variable);
        assert!(
            found == Some(code) && stderr.contains(expected),
            "{model}: {found:?} {stderr}"
        );
        assert_eq!(stderr.matches("error:").count(), 1, "{stderr}");
    }
}

#[cfg(unix)]
#[test]
fn a_command_that_is_ended_leaves_what_has_arrived_for_the_next_run() {
    use std::os::unix::process::ExitStatusExt;
    let (server, cache) = (Server::new(), cache());
    let (started, sending) = std::sync::mpsc::channel();
    let started = Mutex::new(started);
    server.instead_of(
        1,
        |seen| seen.gets("model.safetensors"),
        move |_| {
            started.lock().unwrap().send(()).unwrap();
            let first = Bytes::from(weights()[..WEIGHTS / 2].to_vec());
            let pieces = stream::unfold(Some(first), |piece| async move {
                match piece {
                    Some(piece) => Some((Ok::<_, std::io::Error>(piece), None)),
                    None => std::future::pending().await,
                }
            });
            let response = Response::builder().header("content-length", WEIGHTS);
            response.body(Body::from_stream(pieces)).unwrap()
        },
    );
    let mut child = eval(&server, cache.path(), "hf:a/b").spawn().unwrap();
    sending.recv().unwrap();
    let arrived = || fs::metadata(partial(cache.path())).map_or(0, |partial| partial.len());
    let deadline = Instant::now() + Duration::from_secs(60);
    // A file that another process writes tells nobody.
    while arrived() < WEIGHTS as u64 / 2 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Not Ctrl-C's signal, which a shell makes its background jobs ignore, and so the tests that run in one.
    let ended = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(ended.unwrap().success());
    let status = child.wait().unwrap();
    assert!(status.signal() == Some(15) || status.code() == Some(143), "{status}");
    assert_eq!(arrived(), WEIGHTS as u64 / 2);
    server.seen();
    assert_whole(&fetch(&server.hub(cache.path()), "hf:a/b").unwrap());
    let range = server
        .seen()
        .into_iter()
        .find(|seen| seen.gets("model.safetensors"))
        .unwrap()
        .range;
    assert_eq!(range, Some(format!("bytes={}-", WEIGHTS / 2)));
}
