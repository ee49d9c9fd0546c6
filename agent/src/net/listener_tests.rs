use super::*;
use crate::config::ClusterSecret;
use crate::net::testing::{Pki, cluster, cluster_with, on_control};
use crate::net::{ConnectError, ConnectFailure, Kind, Member, Security, connect};
use crate::types::GangId;
use std::cell::RefCell;
use std::io::{Read, Write};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Keeps the connections it gets; wants no gang 13.
#[derive(Default)]
struct Keep(RefCell<Vec<Incoming>>);

impl ConnectionHandler for Keep {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        match hello.gang {
            GangId(13) => Err("gang 13 is not moving".to_owned()),
            _ => Ok(()),
        }
    }

    fn handle(&self, incoming: Incoming) {
        self.0.borrow_mut().push(incoming);
    }
}

const LIMIT: Duration = Duration::from_secs(5);

async fn dial(roster: &Roster, peer: &str, gang: u64) -> Result<Stream, ConnectError> {
    connect(roster, peer, Kind::Lane, GangId(gang), 3, LIMIT).await
}

fn refusal(result: Result<Stream, ConnectError>) -> (Verdict, String) {
    match result.unwrap_err().source {
        ConnectFailure::Refused { verdict, reason } => (verdict, reason),
        other => panic!("{other}"),
    }
}

#[test]
fn an_accepted_lane_becomes_a_blocking_socket() {
    on_control(async {
        let plain = |_: &str| Security::Plaintext;
        let [(a, _), (b, listener)] = cluster_with([("a1", "A"), ("b1", "B")], plain);
        let keep = Rc::new(Keep::default());
        tokio::task::spawn_local(listener.run(b, keep.clone()));
        let mut mine = dial(&a, "b1", 5).await.unwrap();
        mine.write_all(b"page").await.unwrap();
        while keep.0.borrow().is_empty() {
            tokio::task::yield_now().await;
        }
        let incoming = keep.0.borrow_mut().remove(0);
        let hello = &incoming.hello;
        assert_eq!(
            (hello.kind, hello.gang, hello.tag),
            (Kind::Lane, GangId(5), 3)
        );
        assert_eq!(hello.from, "a1");
        let lane = incoming.stream.into_lane().unwrap();
        assert!(lane.secrets.is_none());
        let mut theirs = lane.tcp;
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 4];
            theirs.read_exact(&mut bytes).unwrap();
            theirs.write_all(b"ack").unwrap();
            bytes
        });
        let mut ack = [0; 3];
        mine.read_exact(&mut ack).await.unwrap();
        assert_eq!(&ack, b"ack");
        assert_eq!(&thread.join().unwrap(), b"page");
    });
}

#[test]
fn refusals_say_why() {
    on_control(async {
        let pki = Pki::new();
        let agents = [("a1", "A"), ("b1", "B")];
        let [(a, _), (b, listener)] = cluster_with(agents, |name| pki.security(name));
        let (me, there) = (a.me().clone(), b.me().clone());
        tokio::task::spawn_local(listener.run(b, Rc::new(Keep::default())));

        let (verdict, why) = refusal(dial(&a, "b1", 13).await);
        assert_eq!(verdict, Verdict::Unwanted);
        assert!(why.contains("gang 13 is not moving"), "{why}");

        let secret = ClusterSecret::from_bytes([7; 32]);
        let stranger = Member {
            name: "x1".into(),
            ..me.clone()
        };
        let security = pki.security("x1");
        let roster = Roster::new(stranger, vec![there.clone()], &secret, security);
        let (verdict, why) = refusal(dial(&roster, "b1", 1).await);
        assert_eq!(verdict, Verdict::Stranger);
        assert!(why.contains("x1 is not a peer of b1"), "{why}");

        let other = Member {
            name: "b2".into(),
            ..there.clone()
        };
        let security = pki.security("a1");
        let roster = Roster::new(me.clone(), vec![other], &secret, security);
        // The certificate tells before the preamble does.
        let error = dial(&roster, "b2", 1).await.unwrap_err().source.to_string();
        assert!(error.contains("is of agent b1, not of agent b2"), "{error}");

        let elsewhere = Member {
            address: "127.0.0.2:1".parse().unwrap(),
            ..me.clone()
        };
        let security = pki.security("a1");
        let roster = Roster::new(elsewhere, vec![there.clone()], &secret, security);
        let (verdict, why) = refusal(dial(&roster, "b1", 1).await);
        assert_eq!(verdict, Verdict::Stranger);
        assert!(why.contains("from 127.0.0.2"), "{why}");

        let secret = ClusterSecret::from_bytes([8; 32]);
        let roster = Roster::new(me, vec![there], &secret, pki.security("a1"));
        let (verdict, why) = refusal(dial(&roster, "b1", 1).await);
        assert_eq!(verdict, Verdict::Secret);
        assert!(why.contains("another cluster secret"), "{why}");

        let error = dial(&a, "nobody", 1).await.unwrap_err();
        assert!(matches!(error.source, ConnectFailure::Unknown));
    });
}

#[test]
fn too_many_connections_are_refused_until_some_end() {
    on_control(async {
        let [(a, _), (b, listener)] = cluster([("a1", "A"), ("b1", "B")]);
        let keep = Rc::new(Keep::default());
        tokio::task::spawn_local(listener.run(b, keep.clone()));
        let mut open = Vec::new();
        for _ in 0..4 {
            open.push(dial(&a, "b1", 1).await.unwrap());
        }
        assert_eq!(refusal(dial(&a, "b1", 1).await).0, Verdict::Busy);
        while keep.0.borrow().len() < 4 {
            tokio::task::yield_now().await;
        }
        keep.0.borrow_mut().pop();
        dial(&a, "b1", 1).await.unwrap();
    });
}

#[test]
fn silence_and_rubbish_are_hung_up_on_and_hold_nobody_up() {
    on_control(async {
        let [(a, _), (b, listener)] = cluster([("a1", "A"), ("b1", "B")]);
        let address = listener.address().unwrap();
        tokio::task::spawn_local(listener.run(b, Rc::new(Keep::default())));
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut rubbish = TcpStream::connect(address).await.unwrap();
        rubbish.write_all(&[b'x'; 200]).await.unwrap();
        dial(&a, "b1", 1).await.unwrap();
        let start = Instant::now();
        for stream in [&mut silent, &mut rubbish] {
            // Perhaps an alert, but no answer, and then the end.
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            assert!(said.len() < 10, "{said:?}");
        }
        assert!(start.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn a_peer_that_never_answers_costs_the_time_limit() {
    on_control(async {
        let [(a, _), (_, listener)] = cluster([("a1", "A"), ("b1", "B")]);
        // Bound, but never accepting.
        let limit = Duration::from_millis(200);
        let start = Instant::now();
        let result = connect(&a, "b1", Kind::Control, GangId(0), 0, limit).await;
        let error = result.unwrap_err();
        assert!(
            matches!(error.source, ConnectFailure::TimedOut(_)),
            "{error}"
        );
        assert!(start.elapsed() < Duration::from_secs(1));
        drop(listener);
        let result = connect(&a, "b1", Kind::Control, GangId(0), 0, limit).await;
        let error = result.unwrap_err();
        assert!(
            error.to_string().contains("agent b1 at 127.0.0.1:"),
            "{error}"
        );
        assert!(matches!(error.source, ConnectFailure::Io(_)));
    });
}

#[test]
fn a_crowd_of_silent_strangers_keeps_no_peer_waiting() {
    on_control(async {
        let [(a, _), (b, listener)] = cluster([("a1", "A"), ("b1", "B")]);
        let address = listener.address().unwrap();
        tokio::task::spawn_local(listener.run(b, Rc::new(Keep::default())));
        let mut crowd = Vec::new();
        for _ in 0..100 {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.3:0".parse().unwrap()).unwrap();
            crowd.push(socket.connect(address).await.unwrap());
        }
        let start = Instant::now();
        dial(&a, "b1", 1).await.unwrap();
        // Less than the crowd has for its preambles.
        assert!(start.elapsed() < Duration::from_millis(550));
    });
}

#[test]
fn a_peer_that_calls_without_end_keeps_no_other_peer_waiting_and_is_named() {
    on_control(async {
        let [(a, _), (b, listener)] = cluster([("a1", "A"), ("b1", "B")]);
        let address = listener.address().unwrap();
        // Another peer, on an address of its own.
        let greedy = Member {
            name: "a2".into(),
            rack: "A".into(),
            address: "127.0.0.4:7400".parse().unwrap(),
            source_addresses: Vec::new(),
        };
        let peers = vec![greedy, a.me().clone()];
        let secret = ClusterSecret::from_bytes([7; 32]);
        let pki = Pki::new();
        let me = b.me().clone();
        let there = Arc::new(Roster::new(me.clone(), peers, &secret, pki.security("b1")));
        let here = Roster::new(a.me().clone(), vec![me], &secret, pki.security("a1"));
        tokio::task::spawn_local(listener.run(there.clone(), Rc::new(Keep::default())));
        let mut crowd = Vec::new();
        for _ in 0..100 {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.4:0".parse().unwrap()).unwrap();
            crowd.push(socket.connect(address).await.unwrap());
        }
        let start = Instant::now();
        dial(&here, "b1", 1).await.unwrap();
        // Less than the crowd has for its preambles.
        assert!(start.elapsed() < Duration::from_millis(550));
        let warnings = there.offences().warnings().concat();
        assert!(warnings.contains("a2 broke the rules"), "{warnings}");
    });
}
