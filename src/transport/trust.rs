//! Which server certificates are accepted.
//!
//! Separate because it is what a person decides about security, and all of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};

use super::{Error, Fingerprint, data_directory};

/// Which server certificates to accept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Trust {
    /// Those of the system's authorities, and that of this user's own server on this machine.
    #[default]
    Known,
    /// Those signed by, or equal to, the certificates in this PEM file.
    Authority(PathBuf),
    /// The one that has this fingerprint, whatever its names and whoever signed it.
    Pinned(Fingerprint),
    /// Any. An attacker on the network can then read and change everything.
    Anyone,
}

impl Trust {
    /// The TLS of a client that accepts these.
    pub(super) fn client_config(&self) -> Result<ClientConfig, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
        let mut tls = match self {
            Trust::Known => builder.with_root_certificates(known_roots()).with_no_client_auth(),
            Trust::Authority(path) => builder.with_root_certificates(authority(path)?).with_no_client_auth(),
            Trust::Pinned(fingerprint) => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(ByKey {
                    provider,
                    pinned: Some(*fingerprint),
                }))
                .with_no_client_auth(),
            Trust::Anyone => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(ByKey { provider, pinned: None }))
                .with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(tls)
    }
}

/// The certificates in a PEM file.
fn authority(path: &Path) -> Result<RootCertStore, Error> {
    let fail = |reason: String| Error::Authority {
        path: path.display().to_string(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| fail(error.to_string()))?;
        roots.add(certificate).map_err(|error| fail(error.to_string()))?;
    }
    if roots.is_empty() {
        Err(fail("it holds no certificate".to_owned()))
    } else {
        Ok(roots)
    }
}

fn known_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Ok(home) = data_directory()
        && let Ok(own) = authority(&home.join("tls/certificate.pem"))
    {
        roots.roots.extend(own.roots);
    }
    roots
}

/// The certificate is not the one that was pinned.
#[derive(Debug, thiserror::Error)]
#[error("it is not the certificate that was pinned")]
pub(super) struct NotPinned;

/// Accepts the pinned certificate, or every one, but only from whoever holds its key.
#[derive(Debug)]
struct ByKey {
    provider: Arc<CryptoProvider>,
    pinned: Option<Fingerprint>,
}

impl ServerCertVerifier for ByKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.pinned {
            Some(pinned) if pinned != Fingerprint::of(end_entity) => {
                Err(CertificateError::Other(OtherError(Arc::new(NotPinned))).into())
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Dialer;
    use super::*;

    #[test]
    fn an_authority_file_must_hold_a_certificate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trust = Trust::Authority(file.path().to_owned());
        assert!(matches!(Dialer::new(&trust), Err(Error::Authority { .. })));
    }
}
