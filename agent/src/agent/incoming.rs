//! Connections from other agents, to where they belong.

use super::Agent;
use crate::gang::message::{GangRequest, GangResponse};
use crate::gang::target::LaneSink;
use crate::lane::{LaneReceiver, LaneStream, ReceiveConfig};
use crate::net::rpc::{self, RpcHandler, RpcLimits};
use crate::net::{ConnectionHandler, Hello, Incoming, Kind};
use crate::types::VmIndex;
use std::rc::Rc;
use std::sync::Arc;

/// The agent as its listener sees it.
pub(super) struct Incomings(pub(super) Rc<Agent>);

/// The agent as callers see it.
struct Requests(Rc<Agent>);

impl ConnectionHandler for Incomings {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        match hello.kind {
            Kind::Control => Ok(()),
            Kind::Rack => self.0.rack.admit(hello),
            Kind::Lane => {
                let gang = self.0.gang(hello.gang)?;
                let sends = gang.spec.vms.iter().any(|v| v.from == hello.from);
                match gang.target.is_some() && sends {
                    true => Ok(()),
                    false => Err(format!("no VM of that gang comes here from {}", hello.from)),
                }
            }
            Kind::DeviceState => {
                let gang = self.0.gang(hello.gang)?;
                let index = u16::try_from(hello.tag).map_err(|_| "no such VM")?;
                let vm = gang.spec.vm(VmIndex(index)).ok_or("no such VM")?;
                match vm.from == hello.from && gang.arrival(VmIndex(index)).is_some() {
                    true => Ok(()),
                    false => Err(format!(
                        "VM {} does not come here from {}",
                        vm.name, hello.from
                    )),
                }
            }
        }
    }

    fn handle(&self, incoming: Incoming) {
        let agent = self.0.clone();
        match incoming.hello.kind {
            Kind::Control => {
                let handler = Rc::new(Requests(agent));
                tokio::task::spawn_local(rpc::serve(incoming, RpcLimits::default(), handler));
            }
            Kind::Rack => {
                if let Err(error) = agent.rack.adopt(incoming) {
                    tracing::error!(%error, "rack connection dropped");
                }
            }
            Kind::Lane => {
                tokio::task::spawn_local(async move { agent.take_lane(incoming).await });
            }
            Kind::DeviceState => {
                if let Ok(gang) = agent.gang(incoming.hello.gang) {
                    gang.touch();
                    tokio::task::spawn_local(async move {
                        agent.relay_device(gang, incoming).await;
                    });
                }
            }
        }
    }
}

impl Agent {
    /// Gives a lane its thread.
    async fn take_lane(&self, incoming: Incoming) {
        let peer = incoming.hello.from.clone();
        let Ok(gang) = self.gang(incoming.hello.gang) else {
            return;
        };
        let Some(target) = gang.target.clone() else {
            return;
        };
        gang.touch();
        let lane = incoming.stream.into_lane();
        let stream = match lane.and_then(|lane| LaneStream::new(lane.tcp, lane.secrets)) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%peer, %error, "lane cannot be taken over");
                return;
            }
        };
        let (name, place) = (peer.clone(), incoming.permit);
        // Starting a lane waits for its thread's ring.
        let started = tokio::task::spawn_blocking(move || {
            let sink = Arc::new(LaneSink::new(target.clone(), &name));
            let lane = LaneReceiver::start(stream, ReceiveConfig::new(name.clone()), sink)?;
            target.lane_opened(&name, lane, place);
            Ok::<_, crate::lane::recv::StartError>(())
        });
        match started.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%peer, %error, "lane not started"),
            Err(panic) => tracing::error!(%peer, %panic, "starting a lane panicked"),
        }
    }
}

impl RpcHandler<GangRequest, GangResponse> for Requests {
    async fn call(self: Rc<Self>, peer: Rc<str>, request: GangRequest) -> GangResponse {
        self.0.clone().gang_request(&peer, request).await
    }

    fn notice(&self, peer: &str, _notice: GangRequest) {
        self.offence(peer, "sent a notice, where gangs only make requests");
    }

    fn lost(&self, peer: &str, why: &str) {
        tracing::debug!(%peer, %why, "control connection ended");
    }

    fn offence(&self, peer: &str, why: &str) {
        self.0.roster.offences().note(peer, why);
    }
}
