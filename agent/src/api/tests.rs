use super::types::*;
use super::*;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

const LONG: Duration = Duration::from_secs(20);

fn limits() -> ApiLimits {
    ApiLimits {
        body: 1000,
        quick: Duration::from_millis(300),
        slow: Duration::from_millis(300),
        head: Duration::from_millis(300),
        ..ApiLimits::default()
    }
}

/// Runs a test beside an agent that answers like this one.
fn with_agent<F: Future<Output = ()>>(test: impl FnOnce(ApiClient, PathBuf) -> F) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/agent.sock");
    tokio_uring::start(async {
        let server = ApiServer::bind(&path, Access::default(), limits()).unwrap();
        let (calls, queue) = mpsc::channel(8);
        let test = tokio::time::timeout(LONG, test(ApiClient::new(&path), path.clone()));
        tokio::select! {
            () = server.run(calls) => panic!("the server ended"),
            () = answer(queue) => panic!("the agent ended"),
            result = test => result.expect("the test hangs"),
        }
    });
    assert!(!path.exists(), "the socket is removed at the end");
}

fn vm(name: &str) -> VmInfo {
    VmInfo {
        name: name.to_owned(),
        kind: "qemu-direct".to_owned(),
        kinds: Vec::new(),
        status: "running".to_owned(),
        ram_bytes: 1 << 30,
        pages_scanned: 5,
        dirty_bytes_per_s: None,
        pid: 77,
        qmp: "/q".into(),
        domain: "d".to_owned(),
    }
}

async fn answer(mut calls: mpsc::Receiver<ApiCall>) {
    let mut never = Vec::new();
    while let Some(call) = calls.recv().await {
        match call {
            ApiCall::ListVms { reply } => drop(reply.send(Ok(vec![vm("v")]))),
            ApiCall::RunVm { request, reply } => drop(reply.send(Ok(vm(&request.name)))),
            ApiCall::AdoptVm { reply, .. } => {
                let error = ApiError::new(ErrorKind::Conflict, "held", "let go");
                drop(reply.send(Err(error)));
            }
            ApiCall::StopVm { name, reply } => {
                assert_eq!(name, "odd/name %");
                drop(reply.send(Ok(())));
            }
            ApiCall::StartMigration { request, reply } => {
                assert!(request.options.align);
                let started = MigrationStarted {
                    gang: request.plan,
                    id: Some("00000000000000ab".to_owned()),
                    checks: Vec::new(),
                };
                drop(reply.send(Ok(started)));
            }
            ApiCall::CancelMigration { id, vm, reply } => {
                assert_eq!((id.as_str(), vm.as_deref()), ("g", Some("v")));
                drop(reply.send(Ok(())));
            }
            ApiCall::Metrics { reply } => drop(reply.send(Ok("drover_up 1\n".to_owned()))),
            // Never answered.
            ApiCall::Status { reply } => never.push(reply),
            // Dropped unanswered.
            _ => {}
        }
    }
}

fn refused(error: ClientError) -> (u16, String, String) {
    match error {
        ClientError::Refused { status, body } => (status, body.error, body.remedy),
        other => panic!("{other}"),
    }
}

#[test]
fn calls_and_answers_cross_the_socket() {
    with_agent(|client, _| async move {
        assert_eq!(client.vms().await.unwrap(), [vm("v")]);
        let name = "new".to_owned();
        assert_eq!(client.run_vm(&RunVm { name }).await.unwrap(), vm("new"));
        client.stop_vm("odd/name %").await.unwrap();
        client.cancel("g", Some("v")).await.unwrap();
        assert_eq!(client.metrics().await.unwrap(), "drover_up 1\n");
        let request = MigrationRequest {
            plan_file: "p".to_owned(),
            plan: "text".to_owned(),
            options: MigrationOptions {
                align: true,
                ..MigrationOptions::default()
            },
        };
        let started = client.migrate(&request).await.unwrap();
        assert_eq!(started.gang, "text");
    });
}

#[test]
fn errors_have_a_status_and_a_remedy() {
    with_agent(|client, _| async move {
        let request = AdoptVm {
            name: "v".to_owned(),
            qmp: "/q".into(),
        };
        let error = client.adopt_vm(&request).await.unwrap_err();
        let expected = (409, "held".to_owned(), "let go".to_owned());
        assert_eq!(refused(error), expected);

        let start = Instant::now();
        let (status, error, _) = refused(client.status().await.unwrap_err());
        assert_eq!(status, 504, "{error}");
        assert!(start.elapsed() < Duration::from_secs(3));

        let (status, error, _) = refused(client.migrations().await.unwrap_err());
        assert_eq!(
            (status, error.as_str()),
            (500, "the agent dropped the request")
        );

        let name = "x".repeat(2000);
        let (status, error, remedy) = refused(client.run_vm(&RunVm { name }).await.unwrap_err());
        assert_eq!(status, 400, "{error}");
        assert!(error.contains("limit"), "{error}");
        assert_eq!(remedy, "send less");
    });
}

/// Sends raw bytes, returns the status code and the body.
fn raw(path: &Path, request: &str) -> (String, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.split(' ').nth(1).unwrap_or_default();
    (status.to_owned(), body.to_owned())
}

#[test]
fn strange_requests_get_json_errors_and_slow_ones_are_cut_off() {
    with_agent(|_, path| async move {
        let checks = tokio::task::spawn_blocking(move || {
            let post = |path: &str, body: &str| {
                format!(
                    "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                     content-length: {}\r\n\r\n{body}",
                    body.len()
                )
            };
            let get =
                |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            let table = [
                (get("/v2/vms"), "404", "no such path"),
                (get("/v1/vms/run"), "405", "does not take"),
                (post("/v1/vms/run", "{"), "400", "JSON is wrong"),
                (
                    post("/v1/vms/run", "{\"nam\":\"x\"}"),
                    "400",
                    "unknown field `nam`",
                ),
                (
                    post("/v1/migrations/g/cancel", "[1]"),
                    "400",
                    "JSON is wrong",
                ),
            ];
            for (request, status, text) in table {
                let (got, body) = raw(&path, &request);
                assert_eq!(got, status, "{request}");
                let body: ErrorBody = serde_json::from_str(&body).unwrap();
                assert!(body.error.contains(text), "{body:?}");
                assert!(!body.remedy.is_empty());
            }
            let start = Instant::now();
            raw(&path, "GET /v1/vm");
            assert!(start.elapsed() < Duration::from_secs(5));
        });
        checks.await.unwrap();
    });
}

#[test]
fn the_socket_is_private_and_belongs_to_one_agent() {
    with_agent(|_, path| async move {
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = ApiServer::bind(&path, Access::default(), limits()).unwrap_err();
        assert!(matches!(error, ServeError::InUse(_)), "{error}");
        assert!(path.exists());
    });
}

#[test]
fn a_socket_left_over_is_replaced_but_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    tokio_uring::start(async {
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(ApiServer::bind(&path, Access::default(), limits()).unwrap());
        // Served by something that takes no lock.
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = ApiServer::bind(&path, Access::default(), limits()).unwrap_err();
        assert!(matches!(error, ServeError::InUse(_)), "{error}");
        drop(other);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = ApiServer::bind(&path, Access::default(), limits()).unwrap_err();
        assert!(matches!(error, ServeError::InTheWay(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    });
}

#[test]
fn without_an_agent_the_error_says_what_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let client = ApiClient::new(&dir.path().join("none.sock"));
    let error = tokio_uring::start(async { client.vms().await.unwrap_err() });
    assert!(error.is_unreachable());
    assert!(error.to_string().contains("none.sock"), "{error}");
    assert!(
        error.remedy().contains("systemctl start"),
        "{}",
        error.remedy()
    );
}
