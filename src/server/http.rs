//! What the server's port answers over HTTP: the page, model parts by content hash, demo data, status; and the door to the
//! two WebSocket services.
//!
//! It is separate from `socket` because nothing here knows the protocol, and from `coordinator` because nothing here may
//! wait for it.

use std::borrow::Cow;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Extension, Path, Request, State, WebSocketUpgrade};
use axum::http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, HOST, HeaderMap, HeaderName,
    HeaderValue, IF_NONE_MATCH, ORIGIN, REFERRER_POLICY, RETRY_AFTER, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::sync::watch;
use tower_http::services::ServeFile;

use super::clock::RunClock;
use super::gate::Passage;
use super::host::Hosts;
use super::limit::GuessLimit;
use super::socket::Door;
use super::store::Blobs;
use crate::protocol::message::Digest;
use crate::protocol::{Bearer, Bearers, Endpoint, is_same_secret};
use crate::transport::SERVER_HEADER;

include!(concat!(env!("OUT_DIR"), "/web_assets.rs"));

const IMMUTABLE: HeaderValue = HeaderValue::from_static("private, max-age=31536000, immutable");
const NO_CACHE: HeaderValue = HeaderValue::from_static("no-cache");
/// Everything from this origin; the federated service may be at another.
const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data:; \
     connect-src 'self' ws: wss:; worker-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
);

/// What every request handler can see.
pub struct Site {
    /// Model parts; none on a federated server.
    pub blobs: Option<Arc<Blobs>>,
    /// `/status`, kept up to date by the coordinator.
    pub status: watch::Receiver<Value>,
    /// For tabs that join without a file of their own.
    pub demo_data: Cow<'static, [u8]>,
    pub door: Door,
    pub hosts: Hosts,
    /// Who is given parts of the model; nobody at a federated server.
    pub bearers: Option<Bearers>,
    /// Who has it may see `/status` from anywhere.
    pub operator: Option<String>,
    pub guesses: Arc<Mutex<GuessLimit>>,
    /// The zero of the sessions' clock.
    pub clock: RunClock,
}

/// The routes.
pub fn router(site: Arc<Site>) -> Router {
    let mut router = Router::new().route("/status", get(status));
    if site.door.main {
        router = router
            .route("/weights/{sha256}", get(weights))
            .route("/demo/train.txt", get(demo))
            .route("/main", get(main_service))
            .fallback(get(page));
    } else {
        router = router.route("/", get(federated_only));
    }
    if site.door.federated {
        router = router.route("/federated", get(federated_service));
    }
    router.layer(from_fn_with_state(site.clone(), guarded)).with_state(site)
}

/// Looks at every request before it is answered, and puts on every answer what holds for all.
async fn guarded(State(site): State<Arc<Site>>, request: Request, next: Next) -> Response {
    if let Some(passage) = request.extensions().get::<Arc<Passage>>() {
        passage.ask();
    }
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
    let mut response = match host.or(request.uri().host()) {
        Some(host) if site.hosts.has(host) => next.run(request).await,
        host => {
            let name: String = host.unwrap_or_default().chars().take(80).collect();
            let text =
                format!("this server does not go by the name `{name}`; if it should, start it with --host NAME\n");
            (StatusCode::MISDIRECTED_REQUEST, text).into_response()
        }
    };
    let name = HeaderName::from_static(SERVER_HEADER);
    for (name, value) in [
        (name, HeaderValue::from_static(env!("CARGO_PKG_VERSION"))),
        (CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ] {
        response.headers_mut().insert(name, value);
    }
    response
}

/// What `Authorization: Bearer` says.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let said = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, bearer) = said.split_once(' ')?;
    Some(bearer.trim()).filter(|bearer| scheme.eq_ignore_ascii_case("bearer") && !bearer.is_empty())
}

/// Whether a request comes from a client of the run, or whoever may become one.
fn admit(site: &Site, address: IpAddr, headers: &HeaderMap) -> Result<(), Box<Response>> {
    let refused = |text: &'static str| {
        let headers = [(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))];
        Box::new((StatusCode::UNAUTHORIZED, headers, text).into_response())
    };
    const WANTED: &str = "this is for clients of the run: show a ticket or the join token (Authorization: Bearer)\n";
    let Some(bearers) = &site.bearers else {
        return Err(refused(
            "this is for the operator: open the link that the server printed\n",
        ));
    };
    let now = site.clock.now();
    let bearer = bearer(headers);
    match (bearers.judge(bearer, now), bearer) {
        (Bearer::Admitted, _) => Ok(()),
        (Bearer::Guess, Some(guess)) => {
            let mut guesses = site.guesses.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(wait) = guesses.pay(address, now) {
                let text = "too many wrong tokens from this address\n";
                let headers = [(RETRY_AFTER, (wait.as_secs() + 1).to_string())];
                return Err(Box::new((StatusCode::TOO_MANY_REQUESTS, headers, text).into_response()));
            }
            if !bearers.is_secret(guess) {
                return Err(refused("the join token is wrong; copy it again from the server\n"));
            }
            guesses.pay_back(address);
            Ok(())
        }
        (Bearer::Nobody | Bearer::Guess, _) => Err(refused(WANTED)),
    }
}

async fn status(
    State(site): State<Arc<Site>>,
    ConnectInfo(address): ConnectInfo<SocketAddr>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let query = uri.query().unwrap_or_default();
    let said = query.split('&').find_map(|part| part.strip_prefix("operator="));
    // A browser that is given a link can show nothing but its query.
    let is_operator = (site.operator.as_deref().zip(said.or(bearer(&headers))))
        .is_some_and(|(operator, said)| is_same_secret(operator, said));
    // On this machine the run's directory can be read as well.
    if !is_operator
        && !address.ip().is_loopback()
        && let Err(refusal) = admit(&site, address.ip(), &headers)
    {
        return *refusal;
    }
    let status = site.status.borrow().clone();
    ([(CACHE_CONTROL, NO_CACHE)], axum::Json(status)).into_response()
}

async fn demo(State(site): State<Arc<Site>>) -> Response {
    let headers = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (CACHE_CONTROL, "no-cache")];
    (headers, site.demo_data.clone()).into_response()
}

async fn federated_only() -> &'static str {
    "This is a federated server: it averages adapters and has no page. Open the main server's address.\n"
}

async fn weights(
    State(site): State<Arc<Site>>,
    ConnectInfo(address): ConnectInfo<SocketAddr>,
    Path(name): Path<String>,
    request: Request,
) -> Response {
    if let Err(refusal) = admit(&site, address.ip(), request.headers()) {
        return *refusal;
    }
    if let Some(passage) = request.extensions().get::<Arc<Passage>>() {
        passage.call();
    }
    let found = name.parse::<Digest>().ok().filter(|digest| digest.to_string() == name);
    let file = found.and_then(|digest| site.blobs.as_ref()?.path(&digest));
    let Some(file) = file else {
        return (StatusCode::NOT_FOUND, "no part of this run's model has that hash\n").into_response();
    };
    match ServeFile::new(file).try_call(request).await {
        Ok(response) => {
            let mut response = response.map(Body::new);
            if response.status().is_success() {
                let headers = response.headers_mut();
                headers.insert(CACHE_CONTROL, IMMUTABLE);
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
                if let Ok(tag) = HeaderValue::from_str(&format!("\"{name}\"")) {
                    headers.insert(ETAG, tag);
                }
            }
            response
        }
        Err(error) => {
            tracing::error!("cannot serve {name}: {error}");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// A file of the web page, or the page that says how to build it.
async fn page(uri: Uri, headers: HeaderMap) -> Response {
    page_of(ASSETS, uri.path(), headers.get(IF_NONE_MATCH))
}

fn page_of(assets: &[(&str, &[u8])], path: &str, known: Option<&HeaderValue>) -> Response {
    let path = match path.trim_start_matches('/') {
        "" => "index.html",
        path => path,
    };
    if assets.is_empty() && path == "index.html" {
        return (page_headers("text/html; charset=utf-8"), UNBUILT_PAGE).into_response();
    }
    let Ok(found) = assets.binary_search_by_key(&path, |(path, _)| path) else {
        return (StatusCode::NOT_FOUND, "not found\n").into_response();
    };
    let contents = assets[found].1;
    let tag = format!("\"{}\"", Digest::of(contents));
    if known.is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, [(ETAG, tag)]).into_response();
    }
    (page_headers(content_type(path)), [(ETAG, tag)], contents.to_vec()).into_response()
}

fn page_headers(content_type: &'static str) -> [(HeaderName, HeaderValue); 2] {
    [
        (CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (CACHE_CONTROL, NO_CACHE),
    ]
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("json" | "webmanifest") => "application/json",
        Some("wasm") => "application/wasm",
        Some("svg") => "image/svg+xml",
        Some("png") => "image/png",
        Some("md" | "txt") | None => "text/plain; charset=utf-8",
        Some(_) => "application/octet-stream",
    }
}

const UNBUILT_PAGE: &str = "<!doctype html>
<html lang=\"en\" data-state=\"unsupported\" data-message=\"The web page is not in this build\">
<meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">
<title>SflLLM: the page is not in this build</title>
<h1>The web page is not in this build</h1>
<p>The server runs, and native clients can join it with <code>sflllm join</code>.
For browser tabs, build the page and the program again:</p>
<pre>cargo xtask web
cargo build --release</pre>
";

async fn main_service(
    State(site): State<Arc<Site>>,
    ConnectInfo(address): ConnectInfo<SocketAddr>,
    Extension(passage): Extension<Arc<Passage>>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    open(&site, Endpoint::Main, address.ip(), passage, &headers, upgrade)
}

async fn federated_service(
    State(site): State<Arc<Site>>,
    ConnectInfo(address): ConnectInfo<SocketAddr>,
    Extension(passage): Extension<Arc<Passage>>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    open(&site, Endpoint::Federated, address.ip(), passage, &headers, upgrade)
}

fn open(
    site: &Arc<Site>,
    endpoint: Endpoint,
    address: IpAddr,
    passage: Arc<Passage>,
    headers: &HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Response {
    // A page from elsewhere could otherwise use this browser's way here. A federated server of its own is asked from the main
    // server's page, which has another origin; tickets protect it.
    if site.door.main && !same_origin(headers) {
        return (StatusCode::FORBIDDEN, "a page from another origin may not join\n").into_response();
    }
    site.door.open(endpoint, address, passage, upgrade)
}

/// Whether a request comes from a page of this server, or from no page at all.
fn same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let origin = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.split_once("://"))
        .map(|(_, host)| host);
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    origin.is_some() && origin == host
}

/// `/status` before the run begins.
pub fn starting() -> Value {
    json!({ "state": "starting" })
}

#[cfg(test)]
mod tests {
    use super::super::gate::Limits;
    use super::*;
    use crate::terms::ids::RunId;

    const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1)), 1);
    const PAGE: &[(&str, &[u8])] = &[("index.html", b"<p>"), ("page.js", b"1"), ("vendor/a.mjs", b"2")];

    fn site(blobs: Blobs) -> Arc<Site> {
        let (inputs, _) = tokio::sync::mpsc::channel(1);
        Arc::new(Site {
            blobs: Some(Arc::new(blobs)),
            status: watch::channel(starting()).1,
            demo_data: Cow::Borrowed(b""),
            door: Door::new((true, true), inputs, Arc::default(), Limits::default()),
            hosts: Hosts::new(["localhost".to_owned()], Vec::new()),
            bearers: Some(Bearers::new(RunId([0; 16]), [0; 32], Some("secret".to_owned()))),
            operator: Some("operator".to_owned()),
            guesses: Arc::default(),
            clock: RunClock::new(std::time::Duration::ZERO),
        })
    }

    #[tokio::test]
    async fn model_parts_are_served_by_hash_in_ranges_and_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::create(directory.path()).unwrap();
        let blob = blobs.add("block.0", |output| output.write_all(b"0123456789")).unwrap();
        let site = site(blobs);
        let ask = async |name: String, range: Option<&str>| {
            let mut request = Request::builder().header(AUTHORIZATION, "Bearer secret");
            if let Some(range) = range {
                request = request.header("range", range);
            }
            let response = weights(
                State(site.clone()),
                ConnectInfo(ADDRESS),
                Path(name),
                request.body(Body::empty()).unwrap(),
            )
            .await;
            let (parts, body) = response.into_parts();
            (parts, axum::body::to_bytes(body, 1000).await.unwrap())
        };
        let (whole, body) = ask(blob.sha256.to_string(), None).await;
        assert_eq!((whole.status, &body[..]), (StatusCode::OK, &b"0123456789"[..]));
        assert_eq!(whole.headers[CACHE_CONTROL], IMMUTABLE);
        let (part, body) = ask(blob.sha256.to_string(), Some("bytes=3-5")).await;
        assert_eq!((part.status, &body[..]), (StatusCode::PARTIAL_CONTENT, &b"345"[..]));
        let (beyond, _) = ask(blob.sha256.to_string(), Some("bytes=30-")).await;
        assert_eq!(beyond.status, StatusCode::RANGE_NOT_SATISFIABLE);
        for unknown in [Digest::of(b"other").to_string(), "..".to_owned(), "block.0".to_owned()] {
            let (parts, _) = ask(unknown, None).await;
            assert_eq!(parts.status, StatusCode::NOT_FOUND);
            assert!(!parts.headers.contains_key(CACHE_CONTROL));
        }
    }

    #[tokio::test]
    async fn who_shows_nothing_gets_no_weights_and_wrong_tokens_run_out() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::create(directory.path()).unwrap();
        let site = site(blobs);
        let ask = |said: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(said) = said {
                headers.insert(AUTHORIZATION, HeaderValue::from_str(said).unwrap());
            }
            match admit(&site, ADDRESS.ip(), &headers) {
                Ok(()) => StatusCode::OK,
                Err(refusal) => refusal.status(),
            }
        };
        assert_eq!(ask(Some("bearer secret")), StatusCode::OK);
        for nothing in [None, Some("Bearer "), Some("Basic secret"), Some("secret")] {
            assert_eq!(ask(nothing), StatusCode::UNAUTHORIZED, "{nothing:?}");
        }
        let wrong: Vec<StatusCode> = (0..12).map(|_| ask(Some("Bearer guess"))).collect();
        assert_eq!(wrong[..10], [StatusCode::UNAUTHORIZED; 10]);
        assert_eq!(wrong[10..], [StatusCode::TOO_MANY_REQUESTS; 2]);
        assert_eq!(
            ask(Some("Bearer secret")),
            StatusCode::TOO_MANY_REQUESTS,
            "or the limit would tell"
        );
    }

    #[tokio::test]
    async fn the_status_is_for_the_operator_clients_and_this_machine() {
        let directory = tempfile::tempdir().unwrap();
        let site = site(Blobs::create(directory.path()).unwrap());
        let ask = async |address: SocketAddr, path: &str, token: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(token) = token {
                headers.insert(
                    AUTHORIZATION,
                    HeaderValue::from_str(&format!("Bearer {token}")).unwrap(),
                );
            }
            let (uri, state) = (path.parse().unwrap(), State(site.clone()));
            status(state, ConnectInfo(address), uri, headers).await.status()
        };
        let here = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);
        assert_eq!(ask(here, "/status", None).await, StatusCode::OK);
        assert_eq!(ask(ADDRESS, "/status", None).await, StatusCode::UNAUTHORIZED);
        assert_eq!(
            ask(ADDRESS, "/status?operator=guess", None).await,
            StatusCode::UNAUTHORIZED
        );
        assert_eq!(ask(ADDRESS, "/status?operator=operator", None).await, StatusCode::OK);
        assert_eq!(ask(ADDRESS, "/status", Some("operator")).await, StatusCode::OK);
        assert_eq!(ask(ADDRESS, "/status", Some("secret")).await, StatusCode::OK);
    }

    #[test]
    fn the_page_is_served_with_its_type() {
        let response = page_of(PAGE, "/", None);
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
        let response = page_of(PAGE, "/vendor/a.mjs", None);
        assert_eq!(response.headers()[CONTENT_TYPE], "text/javascript; charset=utf-8");
        assert_eq!(
            page_of(PAGE, "/vendor/../page.js", None).status(),
            StatusCode::NOT_FOUND
        );
    }

    #[test]
    fn an_unchanged_file_is_not_sent_again() {
        let tag = page_of(PAGE, "/page.js", None).headers()[ETAG].clone();
        assert_eq!(page_of(PAGE, "/page.js", Some(&tag)).status(), StatusCode::NOT_MODIFIED);
        assert_eq!(page_of(PAGE, "/index.html", Some(&tag)).status(), StatusCode::OK);
    }

    #[test]
    fn without_a_bundle_the_page_says_how_to_build_it() {
        assert_eq!(page_of(&[], "/", None).status(), StatusCode::OK);
        assert!(UNBUILT_PAGE.contains("cargo xtask web"));
        assert_eq!(page_of(&[], "/page.js", None).status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn only_this_servers_pages_may_open_the_main_service() {
        let headers = |origin: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, HeaderValue::from_static("127.0.0.1:8080"));
            if let Some(origin) = origin {
                headers.insert(ORIGIN, HeaderValue::from_static(origin));
            }
            headers
        };
        assert!(same_origin(&headers(None)));
        assert!(same_origin(&headers(Some("http://127.0.0.1:8080"))));
        assert!(!same_origin(&headers(Some("https://elsewhere.example"))));
        assert!(!same_origin(&headers(Some("null"))));
    }
}
