//! An agent of the cluster that has no part in a gang, and what it tries.

use super::acts::{self, frame, hung_up_on};
use super::identity::{CONNECT, Identity};
use super::source::made_up;
use anyhow::{Context, Result, ensure};
use drover::gang::message::{GangRequest, GangResponse, GangSpec};
use drover::net::Kind;
use drover::net::rack::wire::Message;
use drover::net::rack::{ClaimOp, Wanted};
use drover::net::rpc::{RpcClient, RpcLimits};
use drover::types::{Fingerprint, VmIndex};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

/// Connections that never say a word.
const SILENT: usize = 200;
/// How long one that says a byte a second may be listened to.
const SLOW: Duration = Duration::from_secs(40);

/// Tries to take a part in the gang that it has not, at its target host.
///
/// # Errors
/// When it gets anywhere.
pub async fn meddle(who: &Identity, to: &str, gang: &GangSpec) -> Result<()> {
    for kind in [Kind::Lane, Kind::DeviceState] {
        let refused = who.call(to, kind, gang.id).await;
        let why = refused.err().context("an outsider was let in")?.to_string();
        ensure!(why.contains(who.name()), "no name in the refusal: {why}");
    }
    let (vm, name) = (VmIndex(0), gang.vms[0].name.clone());
    let gang_id = gang.id;
    let mut other = gang.clone();
    other.coordinator = who.name().to_owned();
    use GangRequest as R;
    let requests = [
        R::Open(other),
        R::Progress { gang: gang_id },
        R::StartSource { gang: gang_id, vm },
        R::Switch { gang: gang_id, vm },
        R::Cancel { gang: gang_id, vm },
        R::Close { gang: gang_id },
        R::TakeOver { gang: gang_id },
        R::ExpectDevice { gang: gang_id, vm },
        R::Seal {
            gang: gang_id,
            vm,
            digest: [0; 16],
            full: false,
            wait_ms: 1,
        },
        R::AwaitDevice {
            gang: gang_id,
            vm,
            wait_ms: 1,
        },
        R::Resume {
            gang: gang_id,
            vm: name.clone(),
            run: true,
        },
        R::Abort {
            gang: gang_id,
            vm: name,
            why: "because".into(),
        },
    ];
    let client = RpcClient::new(who.roster.clone(), to, RpcLimits::default());
    for request in requests {
        let answer: GangResponse = client.call(&request, CONNECT).await?;
        ensure!(
            matches!(answer, GangResponse::Failed(_)),
            "an outsider's {request:?} was answered {answer:?}"
        );
    }
    Ok(())
}

/// Tries to fetch pages of the gang.
///
/// # Errors
/// When it is not hung up on.
pub async fn fetch(who: &Identity, to: &str, gang: &GangSpec) -> Result<()> {
    let mut bytes = Vec::new();
    let message = Message::Fetch {
        ticket: 1,
        gang: gang.id,
        limit_ms: 1000,
        wanted: vec![Wanted {
            fp: made_up(1),
            domain: 0,
        }],
    };
    frame(&mut bytes, |out| message.encode(out));
    hung_up_on(who, to, Kind::Rack, &bytes).await.map(drop)
}

/// Tries to claim contents for the gang's first target.
///
/// # Errors
/// When it is not hung up on.
pub async fn claim(who: &Identity, to: &str, gang: &GangSpec, fps: &[Fingerprint]) -> Result<()> {
    let target = &gang.vms[0].to;
    let holder = gang.holder(target).context("no holder")?;
    let rack = gang.rack_of(target).context("no rack")?;
    let message = Message::Claim {
        ticket: 1,
        gang: gang.claim_space(rack).context("no claims")?,
        op: ClaimOp::Claim {
            fps: fps.iter().take(100).copied().collect(),
            holder,
        },
    };
    let mut bytes = Vec::new();
    frame(&mut bytes, |out| message.encode(out));
    hung_up_on(who, to, Kind::Rack, &bytes).await?;
    for (what, bytes) in acts::huge_rack_messages(gang.id) {
        hung_up_on(who, to, Kind::Rack, &bytes)
            .await
            .context(what)?;
    }
    Ok(())
}

/// Connects without a word, many times over, and then says a message a byte a
/// second, until nobody listens.
///
/// # Errors
/// When it is listened to for long.
pub async fn dawdle(who: &Identity, to: &str) -> Result<()> {
    let peer = who.roster.peer(to).context("no such peer")?;
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        let socket = TcpSocket::new_v4()?;
        socket.bind((who.listen.ip(), 0).into())?;
        let connected = tokio::time::timeout(CONNECT, socket.connect(peer.address));
        // Those beyond its share may be hung up on before they are connected.
        if let Ok(Ok(stream)) = connected.await {
            silent.push(stream);
        }
    }
    // In the end it is heard again, when its silent connections were given up.
    let begun = Instant::now();
    let mut stream = loop {
        match who.call(to, Kind::Control, drover::types::GangId(0)).await {
            Ok(stream) => break stream,
            Err(error) if begun.elapsed() > SLOW => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    drop(silent);
    // A message of 4 MiB, of which it has all the time in the world.
    stream.write_all(&(4u32 << 20).to_le_bytes()).await?;
    let begun = Instant::now();
    let mut hung_up = false;
    while !hung_up {
        ensure!(begun.elapsed() < SLOW, "a byte a second is waited for");
        let sent = async {
            stream.write_all(&[1]).await?;
            stream.flush().await
        };
        hung_up = sent.await.is_err();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}
