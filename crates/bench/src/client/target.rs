//! The server's address as typed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use http::Uri;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

/// Where the server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    is_tls: bool,
    host: String,
    port: u16,
    /// As in the `host` header.
    authority: String,
    /// In front of `/v1/...`; empty or begins with a slash and does not end with one.
    base_path: String,
    /// Whose certificates are trusted, in place of the public authorities.
    authorities: Option<Arc<[CertificateDer<'static>]>>,
}

/// An address that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("--url {0:?} is no address; give one such as http://127.0.0.1:8000")]
    NoUrl(String),
    #[error("--url {url:?} begins with {scheme}; http and https are allowed")]
    Scheme { url: String, scheme: String },
    #[error("--url holds a user name or a key; give keys with --api-key-file or in the environment")]
    Credentials,
    #[error("--url {0:?} has a query; leave out what follows the question mark")]
    Query(String),
    #[error("--ca-file goes with an https address only; leave it out, or use https")]
    NotTls,
    #[error("--ca-file: {} holds no certificate in PEM form: {reason}", path.display())]
    Authorities { path: PathBuf, reason: String },
}

impl Target {
    /// Reads `http://host:port`, with or without `/v1` at its end.
    ///
    /// # Errors
    /// If it is no address, or has parts that would be ignored.
    pub fn parse(url: &str) -> Result<Self, TargetError> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: Uri = full.parse().map_err(|_| TargetError::NoUrl(url.into()))?;
        let scheme = uri.scheme_str().unwrap_or_default();
        let is_tls = match scheme {
            "http" => false,
            "https" => true,
            other => return Err(TargetError::Scheme { url: url.into(), scheme: other.into() }),
        };
        let authority = uri.authority().ok_or_else(|| TargetError::NoUrl(url.into()))?;
        if authority.as_str().contains('@') {
            return Err(TargetError::Credentials);
        }
        if uri.query().is_some() {
            return Err(TargetError::Query(url.into()));
        }
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            is_tls,
            host: authority.host().trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: authority.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            authority: authority.as_str().to_owned(),
            base_path: path.strip_suffix("/v1").unwrap_or(path).to_owned(),
            authorities: None,
        })
    }

    /// Trusts the authorities of a PEM file, in place of the public ones.
    ///
    /// # Errors
    /// If the address is not https, or the file holds no certificate.
    pub fn trusting(mut self, file: &Path) -> Result<Self, TargetError> {
        if !self.is_tls {
            return Err(TargetError::NotTls);
        }
        let failed = |reason: String| TargetError::Authorities { path: file.to_owned(), reason };
        let found = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let found = found.map_err(|error| failed(error.to_string()))?;
        if found.is_empty() {
            return Err(failed("it has none".into()));
        }
        self.authorities = Some(found.into());
        Ok(self)
    }

    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    pub(super) fn authorities(&self) -> Option<&[CertificateDer<'static>]> {
        self.authorities.as_deref()
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The form in which a request line carries a path of the server.
    pub fn path(&self, path: &str) -> Uri {
        // The base was part of a URI and the paths are this crate's own.
        format!("{}{path}", self.base_path).parse().unwrap_or_default()
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        write!(out, "{scheme}://{}{}", self.authority, self.base_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_type_them() {
        for (url, host, port, path, shown) in [
            ("http://127.0.0.1:8000", "127.0.0.1", 8000, "/v1/models", "http://127.0.0.1:8000"),
            ("localhost:8000/", "localhost", 8000, "/v1/models", "http://localhost:8000"),
            ("https://api.example.com/v1/", "api.example.com", 443, "/v1/models", "https://api.example.com"),
            ("http://[::1]:9/lab/v1", "::1", 9, "/lab/v1/models", "http://[::1]:9/lab"),
        ] {
            let target = Target::parse(url).unwrap();
            assert_eq!((target.host(), target.port()), (host, port), "{url}");
            assert_eq!(target.path("/v1/models").to_string(), path, "{url}");
            assert_eq!(target.to_string(), shown, "{url}");
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused_and_no_key_is_shown() {
        for (url, part) in
            [("", "no address"), ("ftp://x", "ftp"), ("http://x/?a=1", "query"), ("http://a b", "no address")]
        {
            let error = Target::parse(url).unwrap_err().to_string();
            assert!(error.contains(part), "{url}: {error}");
        }
        let error = Target::parse("http://me:sk-secret@x").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
