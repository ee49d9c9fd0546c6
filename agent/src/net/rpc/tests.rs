use super::*;
use crate::net::listener::Incoming;
use crate::net::testing::{cluster, on_control};
use crate::net::{ConnectionHandler, Hello, Roster, Stream};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use tokio::io::AsyncWriteExt;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Ask {
    Echo(Vec<u8>),
    Sleep(u64),
    Long(usize),
    Note(u32),
}

type Client = RpcClient<Ask, Vec<u8>>;

/// Answers [`Ask`]s; can be told to hold connections without serving them.
#[derive(Default)]
struct Server {
    notes: RefCell<Vec<u32>>,
    lost: RefCell<Vec<String>>,
    offences: RefCell<Vec<String>>,
    finished: Cell<u32>,
    deaf: Cell<bool>,
    held: RefCell<Vec<Incoming>>,
    tasks: RefCell<Vec<tokio::task::AbortHandle>>,
}

impl RpcHandler<Ask, Vec<u8>> for Server {
    async fn call(self: Rc<Self>, peer: Rc<str>, request: Ask) -> Vec<u8> {
        assert_eq!(&*peer, "a1");
        let answer = match request {
            Ask::Echo(bytes) => bytes,
            Ask::Sleep(ms) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                Vec::new()
            }
            Ask::Long(n) => vec![1; n],
            Ask::Note(_) => Vec::new(),
        };
        self.finished.set(self.finished.get() + 1);
        answer
    }

    fn notice(&self, _: &str, notice: Ask) {
        if let Ask::Note(n) = notice {
            self.notes.borrow_mut().push(n);
        }
    }

    fn lost(&self, _: &str, why: &str) {
        self.lost.borrow_mut().push(why.to_owned());
    }

    fn offence(&self, peer: &str, why: &str) {
        self.offences.borrow_mut().push(format!("{peer}: {why}"));
    }
}

struct Accept(Rc<Server>, RpcLimits);

impl ConnectionHandler for Accept {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Ok(())
    }

    fn handle(&self, incoming: Incoming) {
        if self.0.deaf.get() {
            self.0.held.borrow_mut().push(incoming);
        } else {
            let session = serve::<Ask, Vec<u8>, _>(incoming, self.1, self.0.clone());
            let task = tokio::task::spawn_local(session);
            self.0.tasks.borrow_mut().push(task.abort_handle());
        }
    }
}

const LIMIT: Duration = Duration::from_secs(5);

fn start(limits: RpcLimits) -> (Client, Rc<Server>, Arc<Roster>) {
    let [(a, _), (b, listener)] = cluster([("a1", "A"), ("b1", "B")]);
    let server = Rc::new(Server::default());
    tokio::task::spawn_local(listener.run(b, Rc::new(Accept(server.clone(), limits))));
    (RpcClient::new(a.clone(), "b1", limits), server, a)
}

fn small() -> RpcLimits {
    RpcLimits {
        max_frame: 10_000,
        in_flight: 4,
        slow: Duration::from_secs(1),
        ..RpcLimits::default()
    }
}

#[test]
fn calls_overtake_each_other_and_notices_keep_their_order() {
    on_control(async {
        let (client, server, _) = start(small());
        assert_eq!(client.state(), PeerState::Idle);
        let (slow, quick) = (client.clone(), client.clone());
        let slow = tokio::task::spawn_local(async move {
            slow.call(&Ask::Sleep(300), LIMIT).await.unwrap();
            Instant::now()
        });
        let answer = quick.call(&Ask::Echo(b"hi".to_vec()), LIMIT).await.unwrap();
        let quick_at = Instant::now();
        assert_eq!(answer, b"hi");
        for n in 0..4 {
            client.notify(&Ask::Note(n)).unwrap();
        }
        assert!(slow.await.unwrap() > quick_at);
        assert_eq!(*server.notes.borrow(), [0, 1, 2, 3]);
        assert_eq!(client.state(), PeerState::Connected { epoch: 1 });
    });
}

#[test]
fn the_time_limit_of_a_call_holds_and_the_connection_lives_on() {
    on_control(async {
        let (client, server, _) = start(small());
        let limit = Duration::from_millis(200);
        let error = client.call(&Ask::Sleep(600), limit).await.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("agent b1 at 127.0.0.1:") && text.contains("200ms"),
            "{text}"
        );
        client.call(&Ask::Echo(vec![]), LIMIT).await.unwrap();
        assert_eq!(client.state(), PeerState::Connected { epoch: 1 });
        // The handler runs to its end although its caller is gone.
        while server.finished.get() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

#[test]
fn a_peer_that_falls_silent_is_noticed_within_two_seconds() {
    on_control(async {
        let (client, server, _) = start(small());
        server.deaf.set(true);
        let mut state = client.watch();
        let calling = client.clone();
        let call =
            tokio::task::spawn_local(async move { calling.call(&Ask::Echo(vec![]), LIMIT).await });
        state.changed().await.unwrap();
        assert_eq!(
            *state.borrow_and_update(),
            PeerState::Connected { epoch: 1 }
        );
        let start = Instant::now();
        state.changed().await.unwrap();
        assert!(
            start.elapsed() <= Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        let error = call.await.unwrap().unwrap_err();
        assert!(
            matches!(&error, RpcError::Lost { why, .. } if why.contains("nothing")),
            "{error}"
        );
        // It comes back as soon as the peer does.
        server.deaf.set(false);
        client.call(&Ask::Echo(vec![]), LIMIT).await.unwrap();
        assert_eq!(client.state(), PeerState::Connected { epoch: 2 });
    });
}

#[test]
fn a_caller_that_falls_silent_is_noticed_too() {
    on_control(async {
        let (_, server, roster) = start(small());
        let silent = crate::net::connect(
            &roster,
            "b1",
            crate::net::Kind::Control,
            crate::types::GangId(0),
            0,
            LIMIT,
        );
        let _silent: Stream = silent.await.unwrap();
        let start = Instant::now();
        while server.lost.borrow().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(
            start.elapsed() <= Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
    });
}

#[test]
fn a_broken_connection_fails_what_was_under_way_and_is_opened_again() {
    on_control(async {
        let (client, server, _) = start(small());
        client.call(&Ask::Echo(vec![]), LIMIT).await.unwrap();
        let calling = client.clone();
        let call =
            tokio::task::spawn_local(async move { calling.call(&Ask::Sleep(3000), LIMIT).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.tasks.borrow()[0].abort();
        let error = call.await.unwrap().unwrap_err();
        assert!(matches!(error, RpcError::Lost { .. }), "{error}");
        client.call(&Ask::Echo(vec![]), LIMIT).await.unwrap();
        assert_eq!(client.state(), PeerState::Connected { epoch: 2 });
    });
}

#[test]
fn an_unreachable_peer_is_named_with_its_address_and_the_cause() {
    on_control(async {
        let [(a, _), (_, listener)] = cluster([("a1", "A"), ("b1", "B")]);
        drop(listener);
        let client = Client::new(a, "b1", small());
        let limit = Duration::from_millis(300);
        let text = client
            .call(&Ask::Sleep(0), limit)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("cannot reach agent b1 at 127.0.0.1:"),
            "{text}"
        );
        assert!(text.contains("refused"), "{text}");
        assert!(matches!(client.state(), PeerState::Lost { .. }));
    });
}

#[test]
fn oversize_messages_fail_alone() {
    on_control(async {
        let (client, _, _) = start(small());
        let error = client
            .call(&Ask::Echo(vec![0; 10_000]), LIMIT)
            .await
            .unwrap_err();
        assert!(matches!(error, RpcError::TooLong { .. }), "{error}");
        let error = client.call(&Ask::Long(20_000), LIMIT).await.unwrap_err();
        assert!(
            matches!(&error, RpcError::Fault { why, .. } if why.contains("10000")),
            "{error}"
        );
        client.call(&Ask::Long(9_000), LIMIT).await.unwrap();
        assert_eq!(client.state(), PeerState::Connected { epoch: 1 });
    });
}

#[test]
fn rubbish_closes_the_connection() {
    on_control(async {
        let (_, server, roster) = start(small());
        let bad: [&[u8]; 4] = [
            &[0xff; 4],
            &[9, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0],
            &[10, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 99],
            &[1, 0, 0, 0, 7],
        ];
        for (i, bytes) in bad.into_iter().enumerate() {
            let mut stream = raw(&roster).await;
            stream.write_all(bytes).await.unwrap();
            let start = Instant::now();
            while server.lost.borrow().len() <= i {
                assert!(start.elapsed() < Duration::from_secs(30), "case {i}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        assert_eq!(server.finished.get(), 0);
        let offences = server.offences.borrow();
        assert!(offences.len() == 4 && offences[0].contains("a1: a frame of"));
    });
}

#[test]
fn a_byte_a_second_is_not_waited_for_and_its_sender_is_named() {
    on_control(async {
        let (_, server, roster) = start(small());
        let mut stream = raw(&roster).await;
        stream.write_all(&[0, 16, 0, 0, 1]).await.unwrap();
        // The sender shows that it lives, but the message does not grow.
        while stream.write_all(&[0]).await.is_ok() && server.lost.borrow().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        while server.offences.borrow().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(server.offences.borrow()[0].contains("a1: sends a message too slowly"));
    });
}

#[test]
fn who_asks_without_end_is_refused_and_named_once() {
    on_control(async {
        let (_, server, roster) = start(small());
        let stream = raw(&roster).await;
        let body = postcard::to_stdvec(&Ask::Sleep(5000)).unwrap();
        let mut requests = Vec::new();
        for id in 0..5000 {
            let mut payload = Vec::new();
            let body = &body;
            Envelope::Request { id, body }.encode(&mut payload);
            requests.extend((payload.len() as u32).to_le_bytes());
            requests.extend(payload);
        }
        let (mut read, mut write) = tokio::io::split(stream);
        let mut nowhere = tokio::io::sink();
        let reading = tokio::io::copy(&mut read, &mut nowhere);
        let sending = async {
            write.write_all(&requests).await.unwrap();
            write.flush().await.unwrap();
            while server.offences.borrow().is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            end = reading => panic!("hung up on: {end:?}"),
            () = sending => {}
        }
        assert_eq!(server.offences.borrow().len(), 1);
        assert!(server.offences.borrow()[0].contains("a1: asks without end"));
    });
}

/// A control connection without a client.
async fn raw(roster: &Roster) -> Stream {
    let kind = crate::net::Kind::Control;
    let gang = crate::types::GangId(0);
    let stream = crate::net::connect(roster, "b1", kind, gang, 0, LIMIT).await;
    stream.unwrap()
}

#[test]
fn requests_in_flight_are_bounded() {
    on_control(async {
        let (client, server, _) = start(small());
        let calls: Vec<_> = (0..12)
            .map(|_| {
                let client = client.clone();
                tokio::task::spawn_local(async move { client.call(&Ask::Sleep(100), LIMIT).await })
            })
            .collect();
        let start = Instant::now();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        // Twelve calls, four at a time.
        assert!(start.elapsed() >= Duration::from_millis(290));
        assert_eq!(server.finished.get(), 12);
    });
}
