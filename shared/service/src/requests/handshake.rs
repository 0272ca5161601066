//! From an address to a connection that may subscribe: TCP, INFO, TLS, CONNECT.

use std::sync::Arc;
use std::time::Duration;

use async_nats::{ServerAddr, ServerInfo};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::protocol::{Decoder, Frame};
use base::error::Fatal;
use nats::settings::NatsSettings;
use secrecy::{ExposeSecret, SecretString};

/// How long a server may take from the first packet to its reply to CONNECT.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);

/// A TCP connection, with TLS or without.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl Stream for TcpStream {}
impl Stream for tokio_rustls::client::TlsStream<TcpStream> {}

/// A connection whose server has accepted our CONNECT.
pub(super) struct Connected {
    pub stream: Box<dyn Stream>,
    pub decoder: Decoder,
    pub info: ServerInfo,
}

/// Why no connection was made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    /// The server is away or does not reply: another attempt may succeed.
    #[error("{0}")]
    Away(String),
    /// The server does not accept our credentials: the configuration has to change.
    #[error("{0}")]
    Unauthorized(String),
}

/// How we authenticate.
pub(super) struct Credentials {
    name: String,
    user: Option<SecretString>,
    pass: Option<SecretString>,
    /// A user's JWT and the key that it belongs to, from `NATS_CREDS`.
    signed: Option<(String, KeyPair)>,
}

impl Credentials {
    /// # Errors
    /// `NATS_CREDS` cannot be read.
    pub(super) fn new(settings: &NatsSettings, name: &str) -> Result<Credentials, Fatal> {
        let mut signed = None;
        if let Some(path) = &settings.credentials {
            let wrong = |what: String| {
                Fatal::new(format!(
                    "configuration: NATS_CREDS={} {what}",
                    path.display()
                ))
            };
            let text = std::fs::read_to_string(path)
                .map_err(|error| wrong(format!("cannot be read: {error}")))?;
            signed = Some(
                parse_creds(&text).ok_or_else(|| wrong("is not a credentials file".to_owned()))?,
            );
        }
        let (user, pass) = match signed {
            Some(_) => (None, None),
            None => (settings.user.clone(), settings.password.clone()),
        };
        Ok(Credentials {
            name: name.to_owned(),
            user,
            pass,
            signed,
        })
    }

    /// The JSON of CONNECT.
    fn connect(&self, address: &ServerAddr, info: &ServerInfo) -> Result<Value, ConnectError> {
        // As async-nats does: credentials in a URL are meant for that server.
        let (user, pass) = match address.username() {
            Some(user) => (Some(user), address.password()),
            None => (exposed(&self.user), exposed(&self.pass)),
        };
        let mut connect = json!({
            "verbose": false, "pedantic": false, "protocol": 1, "headers": true, "echo": true,
            "no_responders": false, "tls_required": address.tls_required(),
            "lang": "rust", "version": env!("CARGO_PKG_VERSION"), "name": self.name,
        });
        if let Some((jwt, key)) = &self.signed {
            let signature = key.sign(info.nonce.as_bytes());
            let signature = signature.map_err(|error| {
                ConnectError::Unauthorized(format!("NATS_CREDS cannot sign: {error}"))
            })?;
            connect["jwt"] = jwt.as_str().into();
            connect["sig"] = URL_SAFE_NO_PAD.encode(signature).into();
        } else if let Some(user) = user {
            connect["user"] = user.into();
            connect["pass"] = pass.unwrap_or_default().into();
        }
        Ok(connect)
    }
}

fn exposed(secret: &Option<SecretString>) -> Option<&str> {
    secret.as_ref().map(|secret| secret.expose_secret())
}

/// JWT and seed of a credentials file: the lines after `-----BEGIN …-----`.
fn parse_creds(text: &str) -> Option<(String, KeyPair)> {
    let after = |title: &str| {
        let mut lines = text
            .lines()
            .map(str::trim)
            .skip_while(|line| !(line.starts_with("---") && line.contains(title)));
        lines
            .nth(1)
            .filter(|line| !line.is_empty() && !line.starts_with("---"))
    };
    let key = KeyPair::from_seed(after("BEGIN USER NKEY SEED")?).ok()?;
    Some((after("BEGIN NATS USER JWT")?.to_owned(), key))
}

/// Connects to one server.
pub(super) async fn connect(
    address: &ServerAddr,
    tls_name: &str,
    credentials: &Credentials,
) -> Result<Connected, ConnectError> {
    let timed_out =
        |_| ConnectError::Away(format!("no reply within {} s", HANDSHAKE_LIMIT.as_secs()));
    tokio::time::timeout(HANDSHAKE_LIMIT, shake_hands(address, tls_name, credentials))
        .await
        .map_err(timed_out)?
}

async fn shake_hands(
    address: &ServerAddr,
    tls_name: &str,
    credentials: &Credentials,
) -> Result<Connected, ConnectError> {
    let mut tcp = TcpStream::connect((address.host(), address.port()))
        .await
        .map_err(away)?;
    tcp.set_nodelay(true).map_err(away)?;
    let mut decoder = Decoder::new();
    let info = match next_frame(&mut tcp, &mut decoder).await? {
        Frame::Info(json) => parse_info(&json)?,
        Frame::Error(text) => return Err(rejected(text)),
        _ => {
            return Err(ConnectError::Away(
                "the server did not begin with INFO".to_owned(),
            ));
        }
    };
    let mut stream: Box<dyn Stream> = if address.tls_required() || info.tls_required {
        Box::new(secure(tcp, tls_name).await?)
    } else {
        Box::new(tcp)
    };
    let connect = credentials.connect(address, &info)?;
    stream
        .write_all(format!("CONNECT {connect}\r\nPING\r\n").as_bytes())
        .await
        .map_err(away)?;
    stream.flush().await.map_err(away)?;
    loop {
        match next_frame(&mut stream, &mut decoder).await? {
            Frame::Pong => break,
            Frame::Error(text) => return Err(rejected(text)),
            Frame::Ping => stream.write_all(b"PONG\r\n").await.map_err(away)?,
            Frame::Info(_) | Frame::Ok | Frame::Message(_) => {}
        }
    }
    decoder.set_max_payload(info.max_payload);
    Ok(Connected {
        stream,
        decoder,
        info,
    })
}

/// Parses INFO, which the server sends first and whenever its cluster changes.
pub(super) fn parse_info(json: &[u8]) -> Result<ServerInfo, ConnectError> {
    serde_json::from_slice(json)
        .map_err(|error| ConnectError::Away(format!("the server's INFO is not valid: {error}")))
}

async fn next_frame(
    stream: &mut (impl AsyncRead + Unpin),
    decoder: &mut Decoder,
) -> Result<Frame, ConnectError> {
    loop {
        if let Some(frame) = decoder.next().map_err(away)? {
            return Ok(frame);
        }
        if stream.read_buf(&mut decoder.buffer).await.map_err(away)? == 0 {
            return Err(ConnectError::Away(
                "the server closed the connection".to_owned(),
            ));
        }
    }
}

/// TLS with the root certificates that this machine trusts, or those in `SSL_CERT_FILE`.
async fn secure(
    tcp: TcpStream,
    name: &str,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, ConnectError> {
    let found = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs)
        .await
        .map_err(away)?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    let config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).map_err(away)?;
    TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await
        .map_err(away)
}

fn away(error: impl std::fmt::Display) -> ConnectError {
    ConnectError::Away(error.to_string())
}

/// Classifies the error with which the server rejects a CONNECT.
fn rejected(text: String) -> ConnectError {
    let lower = text.to_lowercase();
    if lower.contains("authorization") || lower.contains("authentication") {
        ConnectError::Unauthorized(text)
    } else {
        ConnectError::Away(text)
    }
}

/// The servers of `NATS_URL`, in its order.
///
/// # Errors
/// One of them is not a server's address.
pub(super) fn addresses(settings: &NatsSettings) -> Result<Vec<ServerAddr>, Fatal> {
    let parse = |url: &str| {
        url.trim()
            .parse::<ServerAddr>()
            .ok()
            .filter(|address| !address.is_websocket() && !address.host().is_empty())
    };
    let parsed = settings
        .url
        .expose()
        .split(',')
        .map(parse)
        .collect::<Option<Vec<_>>>();
    parsed.ok_or_else(|| {
        let shown = &settings.url;
        Fatal::new(format!(
            "configuration: NATS_URL={shown} is not of the form nats://host:4222"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_credentials_file_signs_what_the_server_asks() {
        let key = KeyPair::new_user();
        let seed = key.seed().unwrap();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\r\neyJ0.e30.sig\r\n------END NATS USER JWT------\r\n\r\n\
             ************************* IMPORTANT *************************\r\n\
             -----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n"
        );
        let signed = parse_creds(&text).unwrap();
        assert_eq!(
            (signed.0.as_str(), signed.1.public_key()),
            ("eyJ0.e30.sig", key.public_key())
        );
        let credentials = Credentials {
            name: "x".to_owned(),
            user: None,
            pass: None,
            signed: Some(signed),
        };
        let info = ServerInfo {
            nonce: "nonce".to_owned(),
            ..ServerInfo::default()
        };
        let connect = credentials
            .connect(&"nats://here".parse().unwrap(), &info)
            .unwrap();
        let signature = URL_SAFE_NO_PAD
            .decode(connect["sig"].as_str().unwrap())
            .unwrap();
        key.verify(b"nonce", &signature).unwrap();
        assert_eq!(connect["jwt"], "eyJ0.e30.sig");
        for wrong in [
            "",
            "-----BEGIN NATS USER JWT-----\n",
            &text.replace(&seed, "SUAA"),
        ] {
            assert!(parse_creds(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_url_is_shown_without_its_secrets() {
        let settings = |url: &str| NatsSettings::new(url);
        assert_eq!(
            addresses(&settings("nats://a:1, tls://b,c")).unwrap().len(),
            3
        );
        for url in [
            "nats://bob:hunter2@:x",
            "http://bob:hunter2@here",
            "ws://bob:hunter2@here",
            "nats://bob:hunter2@a,,b",
        ] {
            let line = addresses(&settings(url)).unwrap_err().to_string();
            assert!(
                line.contains("NATS_URL=") && !line.contains("hunter2"),
                "{line}"
            );
        }
    }
}
