//! Who may ask what of the API: root, and the members of two groups.
//!
//! The kernel says who has connected ([`Caller`]); the role follows from the
//! configuration and holds for the connection. The rule what a role may do is
//! one line: `GET` looks, everything else changes something.

use super::call::{ApiError, ErrorKind};
use super::peer::Caller;
use super::routes::refuse;
use crate::config::{GroupError, HostGroup};
use axum::extract::Request;
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use std::sync::Arc;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Full,
    /// Look: status, VMs, migrations, metrics.
    ReadOnly,
}

/// Who is admitted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Its members may do everything.
    pub full: Option<HostGroup>,
    /// Its members may look.
    pub read_only: Option<HostGroup>,
}

impl Access {
    /// The groups of agent.toml's `api_group` and `api_readonly_group`.
    pub fn find(full: Option<&str>, read_only: Option<&str>) -> Result<Self, GroupError> {
        Ok(Access {
            full: full.map(HostGroup::find).transpose()?,
            read_only: read_only.map(HostGroup::find).transpose()?,
        })
    }

    /// What a caller may do, or why nothing. The agent's own user is as good
    /// as root: it could take the agent's memory.
    pub fn role(&self, caller: &Caller) -> Result<Role, ApiError> {
        let within =
            |group: &Option<HostGroup>| group.as_ref().is_some_and(|g| caller.is_in(g.gid));
        if caller.uid == 0 || caller.uid == nix::unistd::geteuid().as_raw() || within(&self.full) {
            Ok(Role::Full)
        } else if within(&self.read_only) {
            Ok(Role::ReadOnly)
        } else {
            Err(self.refusal(caller, "may not use this agent"))
        }
    }

    fn refusal(&self, caller: &Caller, what: &str) -> ApiError {
        let wanted = match (&self.full, &self.read_only) {
            (None, None) => "run it as root, or set api_group in agent.toml to a group that \
                             this user is in"
                .to_owned(),
            (Some(full), None) => format!("run it as root or a member of group {}", full.name),
            (None, Some(look)) => format!(
                "run it as root; members of group {} may look (status, vm list, metrics)",
                look.name
            ),
            (Some(full), Some(look)) => format!(
                "run it as root or a member of group {}; members of group {} may look \
                 (status, vm list, metrics)",
                full.name, look.name
            ),
        };
        ApiError::new(
            ErrorKind::Forbidden,
            format!(
                "user {} (group {}, process {}) {what}",
                caller.uid, caller.gid, caller.pid
            ),
            wanted,
        )
    }

    /// The mode of the socket. Without groups the kernel turns everybody but
    /// root away; with groups everybody may connect, so that who is refused
    /// hears why, and the caller's credentials decide.
    pub(super) fn socket_mode(&self) -> u32 {
        match (&self.full, &self.read_only) {
            (None, None) => 0o600,
            _ => 0o666,
        }
    }
}

/// One connection's caller and what was made of it.
#[derive(Debug)]
pub(super) struct Admission {
    access: Arc<Access>,
    caller: Caller,
    pub(super) role: Result<Role, ApiError>,
}

impl Admission {
    pub(super) fn new(access: &Arc<Access>, caller: Caller) -> Self {
        let role = access.role(&caller);
        Admission {
            access: access.clone(),
            caller,
            role,
        }
    }

    fn judge(&self, method: &Method) -> Result<(), ApiError> {
        match self.role {
            Ok(Role::Full) => Ok(()),
            Ok(Role::ReadOnly) if method == Method::GET => Ok(()),
            Ok(Role::ReadOnly) => Err(self.access.refusal(&self.caller, "may only look")),
            Err(ref refused) => Err(refused.clone()),
        }
    }
}

/// Judges every request before its route sees it. A request without an
/// [`Admission`] came by no socket of ours and is refused.
pub(super) async fn check(request: Request, next: Next) -> Response {
    let verdict = match request.extensions().get::<Arc<Admission>>() {
        Some(admission) => {
            let verdict = admission.judge(request.method());
            record(admission, &request, &verdict);
            verdict
        }
        None => Err(ApiError::new(
            ErrorKind::Forbidden,
            "it is not known who asks",
            "look into the agent's log",
        )),
    };
    match verdict {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(error),
    }
}

/// Changes and refusals are for every log, looks for a thorough one.
fn record(admission: &Admission, request: &Request, verdict: &Result<(), ApiError>) {
    let Caller { uid, pid, .. } = admission.caller;
    let (method, path) = (request.method(), request.uri().path());
    match verdict {
        Err(_) => tracing::info!(uid, pid, %method, path, "API request refused"),
        Ok(()) if method == Method::GET => {
            tracing::debug!(uid, pid, %method, path, "API request admitted");
        }
        Ok(()) => tracing::info!(uid, pid, %method, path, "API request admitted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str, gid: u32) -> Option<HostGroup> {
        let name = name.to_owned();
        Some(HostGroup { name, gid })
    }

    fn caller(uid: u32, gid: u32, groups: &[u32]) -> Caller {
        Caller {
            uid,
            gid,
            pid: 7,
            groups: groups.to_vec(),
        }
    }

    #[test]
    fn roles_follow_from_users_and_groups() {
        let access = Access {
            full: group("ops", 500),
            read_only: group("look", 600),
        };
        let role = |caller| access.role(&caller).map_err(|e| e.kind);
        assert_eq!(role(caller(0, 77, &[])), Ok(Role::Full));
        assert_eq!(role(caller(4321, 500, &[])), Ok(Role::Full));
        assert_eq!(role(caller(4321, 1, &[2, 500])), Ok(Role::Full));
        assert_eq!(role(caller(4321, 600, &[500])), Ok(Role::Full));
        assert_eq!(role(caller(4321, 1, &[2, 600])), Ok(Role::ReadOnly));
        assert_eq!(role(caller(4321, 1, &[2])), Err(ErrorKind::Forbidden));
        assert_eq!(role(caller(500, 0, &[])), Err(ErrorKind::Forbidden));
    }

    #[test]
    fn a_refusal_says_who_was_refused_and_which_group_is_needed() {
        let stranger = caller(4321, 77, &[]);
        let refused = |full, read_only| {
            let access = Access { full, read_only };
            access.role(&stranger).unwrap_err()
        };
        let error = refused(group("ops", 500), group("look", 600));
        assert!(error.error.contains("user 4321 (group 77, process 7)"));
        assert!(error.remedy.contains("group ops"), "{}", error.remedy);
        assert!(error.remedy.contains("group look"), "{}", error.remedy);
        let error = refused(None, None);
        assert!(error.remedy.contains("api_group"), "{}", error.remedy);
    }

    #[test]
    fn only_get_looks() {
        let access = Arc::new(Access {
            full: None,
            read_only: group("look", 600),
        });
        let admission = Admission::new(&access, caller(4321, 600, &[]));
        assert!(admission.judge(&Method::GET).is_ok());
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::HEAD] {
            let error = admission.judge(&method).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Forbidden);
            assert!(error.error.contains("may only look"), "{}", error.error);
        }
    }
}
