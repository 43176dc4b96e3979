//! The server's certificate: self-signed, for every address of this machine, kept between runs.
//!
//! It is separate from the sockets because a certificate outlives them: a browser asks about it once, and a file copied to
//! another machine for `--ca` stays good, because the key stays the same when the addresses change.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

use super::Error;
use crate::transport::Fingerprint;

/// Browsers refuse longer ones.
const VALID_DAYS: u64 = 397;
/// A certificate this close to its end is made anew.
const RENEW_DAYS: u64 = 30;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A certificate and its private key.
pub struct Identity {
    pub certificate_file: PathBuf,
    /// Of the certificate, for links.
    pub fingerprint: Fingerprint,
    pub config: Arc<ServerConfig>,
}

/// What `certificate.json` keeps beside the certificate: when to make it anew.
#[derive(Serialize, Deserialize)]
struct Validity {
    names: BTreeSet<String>,
    /// Seconds since 1970.
    not_after: u64,
}

impl Identity {
    /// Reads the identity kept in `home`/tls, and makes what is missing: the key if there is none, the certificate if there
    /// is none, if it is about to expire or if it lacks one of `names`.
    ///
    /// # Errors
    /// [`Error::File`] with the path, [`Error::Certificate`].
    pub fn open(home: &Path, names: &BTreeSet<String>) -> Result<Self, Error> {
        let directory = home.join("tls");
        fs::create_dir_all(&directory).map_err(|error| Error::file("create", &directory, error))?;
        let key_file = directory.join("key.pem");
        let certificate_file = directory.join("certificate.pem");
        let validity_file = directory.join("certificate.json");

        let (key, new_key) = match fs::read_to_string(&key_file) {
            Ok(pem) => (
                KeyPair::from_pem(&pem).map_err(|error| {
                    Error::Certificate(format!(
                        "{}: {error}; remove it to have a new one made",
                        key_file.display()
                    ))
                })?,
                false,
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => (KeyPair::generate().map_err(rcgen_error)?, true),
            Err(error) => return Err(Error::file("read", &key_file, error)),
        };
        if new_key {
            write_private(&key_file, key.serialize_pem().as_bytes())?;
        }

        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let kept = fs::read_to_string(&validity_file)
            .ok()
            .and_then(|text| serde_json::from_str::<Validity>(&text).ok())
            .filter(|kept| {
                !new_key
                    && kept.names.is_superset(names)
                    && kept.not_after > (now + DAY * RENEW_DAYS as u32).as_secs()
                    && certificate_file.is_file()
            });
        if kept.is_none() {
            let not_after = now + DAY * VALID_DAYS as u32;
            let pem = certificate(&key, names, now, not_after)?;
            crate::disk::replace(&certificate_file, pem.as_bytes())?;
            let validity = Validity {
                names: names.clone(),
                not_after: not_after.as_secs(),
            };
            let text = serde_json::to_string_pretty(&validity).expect("a validity has a JSON form");
            crate::disk::replace(&validity_file, text.as_bytes())?;
        }
        let (config, fingerprint) = server_config(&certificate_file, &key)?;
        Ok(Self {
            certificate_file,
            fingerprint,
            config,
        })
    }
}

fn rcgen_error(error: rcgen::Error) -> Error {
    Error::Certificate(error.to_string())
}

/// The PEM text of a certificate for `names`.
fn certificate(
    key: &KeyPair,
    names: &BTreeSet<String>,
    not_before: Duration,
    not_after: Duration,
) -> Result<String, Error> {
    let names: Vec<String> = names.iter().cloned().collect();
    let mut parameters = CertificateParams::new(names).map_err(rcgen_error)?;
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, "sflllm");
    parameters.distinguished_name = subject;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    // A day back: the clocks of phones and laptops differ.
    parameters.not_before = epoch + not_before.saturating_sub(DAY);
    parameters.not_after = epoch + not_after - DAY;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(parameters.self_signed(key).map_err(rcgen_error)?.pem())
}

/// TLS 1.3 only: whoever speaks to this server has been made after it.
fn server_config(certificate_file: &Path, key: &KeyPair) -> Result<(Arc<ServerConfig>, Fingerprint), Error> {
    let fail = |reason: String| {
        Error::Certificate(format!(
            "{}: {reason}; remove it to have a new one made",
            certificate_file.display()
        ))
    };
    let pem = fs::read(certificate_file).map_err(|error| Error::file("read", certificate_file, error))?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| fail(error.to_string()))?;
    let certificate = chain
        .first()
        .ok_or_else(|| fail("it holds no certificate".to_owned()))?;
    let fingerprint = Fingerprint::of(certificate);
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| fail(error.to_owned()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|error| fail(error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((Arc::new(config), fingerprint))
}

/// Writes a file that only its owner may read, from its first byte on.
fn write_private(path: &Path, contents: &[u8]) -> Result<(), Error> {
    use std::io::Write;

    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .map_err(|error| Error::file("write", path, error))
}

/// Every name and address by which this machine may be called: `localhost`, its host name, its interfaces' addresses.
pub fn local_names() -> BTreeSet<String> {
    let mut names = BTreeSet::from(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    if let Some(host) = crate::machine::host_name() {
        if !host.contains('.') {
            names.insert(format!("{host}.local"));
        }
        names.insert(host);
    }
    for interface in if_addrs::get_if_addrs().unwrap_or_default() {
        // A link-local IPv6 address is useless in a link without its interface's name.
        if !matches!(interface.ip(), IpAddr::V6(address) if address.is_unicast_link_local()) {
            names.insert(interface.ip().to_string());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(extra: &[&str]) -> BTreeSet<String> {
        ["localhost", "127.0.0.1"]
            .iter()
            .chain(extra)
            .map(|name| (*name).to_owned())
            .collect()
    }

    fn files(home: &Path) -> (Vec<u8>, Vec<u8>) {
        (
            fs::read(home.join("tls/key.pem")).unwrap(),
            fs::read(home.join("tls/certificate.pem")).unwrap(),
        )
    }

    #[test]
    fn a_certificate_is_kept_between_runs() {
        let home = tempfile::tempdir().unwrap();
        Identity::open(home.path(), &names(&[])).unwrap();
        let first = files(home.path());
        Identity::open(home.path(), &names(&[])).unwrap();
        assert_eq!(files(home.path()), first);
    }

    #[test]
    fn a_new_address_renews_the_certificate_and_keeps_the_key() {
        let home = tempfile::tempdir().unwrap();
        Identity::open(home.path(), &names(&[])).unwrap();
        let (key, certificate) = files(home.path());
        Identity::open(home.path(), &names(&["192.0.2.7"])).unwrap();
        let (key_after, certificate_after) = files(home.path());
        assert_eq!(key, key_after);
        assert_ne!(certificate, certificate_after);
    }

    #[test]
    fn an_expired_certificate_is_renewed() {
        let home = tempfile::tempdir().unwrap();
        Identity::open(home.path(), &names(&[])).unwrap();
        let (_, certificate) = files(home.path());
        let validity_file = home.path().join("tls/certificate.json");
        let mut validity: Validity = serde_json::from_str(&fs::read_to_string(&validity_file).unwrap()).unwrap();
        validity.not_after = 1;
        fs::write(&validity_file, serde_json::to_string(&validity).unwrap()).unwrap();
        Identity::open(home.path(), &names(&[])).unwrap();
        assert_ne!(files(home.path()).1, certificate);
    }

    #[cfg(unix)]
    #[test]
    fn only_the_owner_may_read_the_private_key() {
        use std::os::unix::fs::PermissionsExt;

        let home = tempfile::tempdir().unwrap();
        Identity::open(home.path(), &names(&[])).unwrap();
        let mode = fs::metadata(home.path().join("tls/key.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_key_is_named() {
        let home = tempfile::tempdir().unwrap();
        fs::create_dir_all(home.path().join("tls")).unwrap();
        fs::write(home.path().join("tls/key.pem"), "not a key").unwrap();
        let error = Identity::open(home.path(), &names(&[])).err().unwrap().to_string();
        assert!(error.contains("key.pem"), "{error}");
    }

    #[test]
    fn this_machine_is_known_by_its_loopback_names() {
        assert!(local_names().is_superset(&names(&["::1"])));
    }
}
