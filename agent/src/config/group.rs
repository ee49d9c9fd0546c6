//! Groups of this host, by name.

use thiserror::Error;

/// A group of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostGroup {
    /// As agent.toml names it.
    pub name: String,
    /// Its number.
    pub gid: u32,
}

/// A group of agent.toml cannot be used.
#[derive(Debug, Error)]
pub enum GroupError {
    /// There is none of that name.
    #[error("this host has no group {0}; make it with `groupadd --system {0}`")]
    Unknown(String),
    /// The user database does not answer.
    #[error("cannot look up group {name}")]
    Lookup {
        /// The group.
        name: String,
        /// What the system said.
        #[source]
        source: nix::Error,
    },
}

impl HostGroup {
    /// Looks a group up by its name.
    pub fn find(name: &str) -> Result<Self, GroupError> {
        match nix::unistd::Group::from_name(name) {
            Ok(Some(group)) => Ok(HostGroup {
                name: name.to_owned(),
                gid: group.gid.as_raw(),
            }),
            Ok(None) => Err(GroupError::Unknown(name.to_owned())),
            Err(source) => Err(GroupError::Lookup {
                name: name.to_owned(),
                source,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_and_a_missing_one_is_named() {
        assert_eq!(HostGroup::find("root").unwrap().gid, 0);
        let error = HostGroup::find("no-such-group-here").unwrap_err();
        assert!(error.to_string().contains("groupadd --system no-such"));
    }
}
