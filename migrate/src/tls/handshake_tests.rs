//! Every certificate that is not to be taken, shown at a real connection: what each end says of it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Method, StatusCode};
use http_body_util::{BodyExt, Empty};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::pki::{self, Validity};
use super::{Credentials, Files, Identity};
use crate::agent::door::{Caller, Door, Entered};
use crate::agent::server::speak;
use crate::client::{AgentAt, AgentClient, chain};

/// A folder with a CA, and another CA of the same name.
struct World {
    _root: tempfile::TempDir,
    ours: PathBuf,
    foreign: PathBuf,
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let (ours, foreign) = (root.path().join("ours"), root.path().join("foreign"));
        let year = Validity::days(365).unwrap();
        pki::init(&ours, "drover", year).unwrap();
        pki::init(&foreign, "drover", year).unwrap();
        Self { _root: root, ours, foreign }
    }

    fn issue(&self, identity: Identity, addresses: &[&str]) -> Files {
        issue(&self.ours, identity, addresses)
    }

    /// Trusts both CAs, and has a certificate of the foreign one.
    fn foreigner(&self, identity: Identity) -> Files {
        let files = issue(&self.foreign, identity, &[]);
        let both = self.foreign.join("both.pem");
        let pem = |dir: &Path| std::fs::read_to_string(dir.join("ca.pem")).unwrap();
        std::fs::write(&both, pem(&self.ours) + &pem(&self.foreign)).unwrap();
        Files { ca: both, ..files }
    }
}

fn issue(dir: &Path, identity: Identity, addresses: &[&str]) -> Files {
    let addresses: Vec<String> = addresses.iter().map(|&address| address.to_owned()).collect();
    pki::issue(dir, &identity, &addresses, Validity::days(1).unwrap()).unwrap()
}

fn coordinator(name: &str) -> Identity {
    Identity::Coordinator(name.into())
}

fn agent(site: &str) -> Identity {
    Identity::Agent(site.into())
}

/// A door without the check of the own certificate's role, which an agent would make.
fn door(files: &Files) -> Door {
    Door::Guarded(Arc::new(Credentials::read(files).unwrap().server_config().unwrap()))
}

/// Lets callers in and answers `/healthz`; tells who came, or why somebody did not.
async fn listen(door: Door) -> (SocketAddr, mpsc::UnboundedReceiver<Result<Caller, String>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let router = axum::Router::new().route("/healthz", axum::routing::get(|| async { "ok\n" }));
            match door.let_in(stream).await {
                Ok(Entered::Plain(stream)) => {
                    tell.send(Ok(Caller::Anyone)).unwrap();
                    tokio::spawn(async { speak(stream, Caller::Anyone, false, router).await.unwrap_or(()) });
                }
                Ok(Entered::Tls { stream, caller, is_http2 }) => {
                    assert!(is_http2);
                    let caller = Caller::Known(caller);
                    tell.send(Ok(caller.clone())).unwrap();
                    tokio::spawn(async { speak(stream, caller, true, router).await.unwrap_or(()) });
                }
                Err(error) => tell.send(Err(chain(&error))).unwrap(),
            }
        }
    });
    (address, told)
}

fn client(address: SocketAddr, site: &str, files: &Files) -> AgentClient {
    let at = AgentAt { site: site.into(), url: format!("https://{address}"), tls: Some(files.clone()) };
    AgentClient::new(&at).unwrap()
}

/// What client and server say when `caller` asks for the agent of site `ams` at `server`.
async fn meet(caller: &Files, server: &Files) -> (Result<(), String>, Result<Caller, String>) {
    let (address, mut told) = listen(door(server)).await;
    let client = client(address, "ams", caller);
    let connected = client.connect().await.map_err(|error| chain(&error));
    if connected.is_ok() {
        let body = Empty::new().boxed_unsync();
        assert_eq!(client.send(Method::GET, "/healthz", body).await.unwrap().status(), StatusCode::OK);
    }
    (connected, told.recv().await.unwrap())
}

#[tokio::test]
async fn whoever_is_meant_is_let_in_and_known() {
    let world = World::new();
    let (lb, fra) = (world.issue(coordinator("lb"), &[]), world.issue(agent("fra"), &[]));
    let anywhere = world.issue(agent("ams"), &[]);
    assert_eq!(meet(&lb, &anywhere).await, (Ok(()), Ok(Caller::Known(coordinator("lb")))));
    assert_eq!(meet(&fra, &anywhere).await, (Ok(()), Ok(Caller::Known(agent("fra")))));
    let there = World::new();
    let lb = there.issue(coordinator("lb"), &[]);
    let here = there.issue(agent("ams"), &["ams.example", "127.0.0.1"]);
    assert_eq!(meet(&lb, &here).await.0, Ok(()));
}

#[tokio::test]
async fn whoever_is_not_meant_is_refused_and_both_ends_say_why() {
    let world = World::new();
    let (lb, ams) = (world.issue(coordinator("lb"), &[]), world.issue(agent("ams"), &[]));
    let fra = world.issue(agent("fra"), &[]);
    let foreign_lb = world.foreigner(coordinator("lb"));
    let foreign_ams = world.foreigner(agent("ams"));
    let other_world = World::new();
    let elsewhere = other_world.issue(agent("ams"), &["10.9.9.9"]);
    let lb_there = other_world.issue(coordinator("lb"), &[]);
    let refused = "the other end does not take our certificate: ";
    let their = "its certificate is not taken: ";
    for (what, caller, server, (client_start, client_says), (server_start, server_says)) in [
        ("a caller of a foreign CA", &foreign_lb, &ams, (refused, "another CA"), (their, "another CA")),
        ("a server of a foreign CA", &lb, &foreign_ams, (their, "another CA"), (refused, "another CA")),
        (
            "another site's agent",
            &lb,
            &fra,
            (their, "it is that of the agent of site \"fra\", and the agent of site \"ams\" is meant"),
            (refused, "another site's"),
        ),
        (
            "a coordinator that serves",
            &lb,
            &lb,
            (their, "it is that of coordinator \"lb\", and the agent of site \"ams\" is meant"),
            (refused, "another role's"),
        ),
        (
            "an agent at another address",
            &lb_there,
            &elsewhere,
            (their, "--address"),
            (refused, "other addresses"),
        ),
    ] {
        let (client, server) = meet(caller, server).await;
        for (end, said, start, says) in [
            ("client", client.unwrap_err(), client_start, client_says),
            ("server", server.unwrap_err(), server_start, server_says),
        ] {
            assert!(said.contains(start) && said.contains(says), "{what}: the {end} says {said:?}");
        }
    }
}

#[tokio::test]
async fn a_certificate_that_names_nobody_opens_nothing() {
    let world = World::new();
    let ams = world.issue(agent("ams"), &[]);
    let nobody = world.issue(coordinator("lb"), &[]);
    // What the CA would have signed for a web server.
    let (issuer, _) = pki::open(&world.ours).unwrap();
    let key = rcgen::KeyPair::from_pem(&std::fs::read_to_string(&nobody.key).unwrap()).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["lb.example".to_owned()]).unwrap();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    std::fs::remove_file(&nobody.certificate).unwrap();
    pki::write_new(&nobody.certificate, &params.signed_by(&key, &issuer).unwrap().pem(), 0o644).unwrap();
    let error = chain(&Credentials::read(&nobody).unwrap_err());
    assert!(error.contains("names neither a coordinator nor an agent"), "{error}");

    // One that shows it nevertheless.
    let (address, mut told) = listen(door(&ams)).await;
    let good = Credentials::read(&ams).unwrap();
    let mut pem = rustls::pki_types::pem::PemObject::pem_file_iter(&nobody.certificate).unwrap();
    let chain_: rustls::pki_types::CertificateDer<'static> = pem.next().unwrap().unwrap();
    let key = rustls::pki_types::pem::PemObject::from_pem_file(&nobody.key).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(good.provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(good.site_agent("ams"))
        .with_client_auth_cert(vec![chain_], key)
        .unwrap();
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    let error = super::dial(tcp, Arc::new(config), address.ip().into()).await.unwrap_err().to_string();
    assert!(error.contains("does not take our certificate"), "{error}");
    let said = told.recv().await.unwrap().unwrap_err();
    assert!(said.contains("names neither a coordinator nor an agent"), "{said}");
}

#[tokio::test]
async fn a_certificate_that_expires_is_taken_no_more() {
    let world = World::new();
    let now = SystemTime::now();
    let soon = Validity { from: now - Duration::from_secs(60), until: now + Duration::from_secs(2) };
    let short = |identity: Identity| pki::issue(&world.ours, &identity, &[], soon).unwrap();
    let (short_lb, short_ams) = (short(coordinator("short")), short(agent("ams")));
    let (lb, fra) = (world.issue(coordinator("lb"), &[]), world.issue(agent("fra"), &[]));
    // Read while they are good.
    let (at_short, mut short_told) = listen(door(&short_ams)).await;
    let (at_fra, mut fra_told) = listen(door(&fra)).await;
    let (to_short, from_short) = (client(at_short, "ams", &lb), client(at_fra, "fra", &short_lb));
    tokio::time::sleep(Duration::from_millis(3100)).await;

    let error = chain(&to_short.connect().await.unwrap_err());
    assert!(error.contains("its certificate is not taken: it has expired"), "{error}");
    let said = short_told.recv().await.unwrap().unwrap_err();
    assert!(said.contains("does not take our certificate: it has expired"), "{said}");
    let error = chain(&from_short.connect().await.unwrap_err());
    assert!(error.contains("does not take our certificate: it has expired"), "{error}");
    let said = fra_told.recv().await.unwrap().unwrap_err();
    assert!(said.contains("its certificate is not taken: it has expired"), "{said}");
}

#[tokio::test]
async fn one_end_without_tls_is_told_of_it() {
    let world = World::new();
    let (lb, ams) = (world.issue(coordinator("lb"), &[]), world.issue(agent("ams"), &[]));
    let (plain, _told) = listen(Door::Open).await;
    let error = chain(&client(plain, "ams", &lb).connect().await.unwrap_err());
    assert!(error.contains("does not speak TLS"), "{error}");

    let (guarded, mut told) = listen(door(&ams)).await;
    let at = AgentAt { site: "ams".into(), url: format!("http://{guarded}"), tls: None };
    let body = Empty::new().boxed_unsync();
    AgentClient::new(&at).unwrap().send(Method::GET, "/healthz", body).await.unwrap_err();
    let said = told.recv().await.unwrap().unwrap_err();
    assert!(said.contains("does not speak TLS"), "{said}");
}
