//! Says which capabilities are missing before the kernel says only "no".

use super::MeterError;

/// Capabilities the meter needs, with their bits.
/// Without CAP_PERFMON the kernel's verifier refuses what the programs do.
const NEEDED: [(&str, u32); 3] = [("CAP_NET_ADMIN", 12), ("CAP_BPF", 39), ("CAP_PERFMON", 38)];
/// Before CAP_BPF and CAP_PERFMON there was only this one, and it still
/// includes them.
const SYS_ADMIN: u32 = 21;

/// Checks this thread's effective capabilities.
pub(super) fn check() -> Result<(), MeterError> {
    // A kernel that does not tell will answer when the meter is loaded.
    match std::fs::read_to_string("/proc/thread-self/status") {
        Ok(status) => match missing(&status) {
            Some(missing) => Err(MeterError::Privilege { missing }),
            None => Ok(()),
        },
        Err(_) => Ok(()),
    }
}

fn missing(status: &str) -> Option<String> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    let effective = u64::from_str_radix(line.trim(), 16).ok()?;
    let has = |bit: u32| effective >> bit & 1 == 1;
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(name, bit)| !(has(*bit) || (*name != "CAP_NET_ADMIN" && has(SYS_ADMIN))))
        .map(|(name, _)| *name)
        .collect();
    (!missing.is_empty()).then(|| missing.join(" and "))
}

#[cfg(test)]
mod tests {
    use super::missing;

    #[test]
    fn names_what_is_missing() {
        let status = |caps: &str| format!("Name:\tdrover\nCapEff:\t{caps}\n");
        assert_eq!(missing(&status("000001ffffffffff")), None);
        assert_eq!(
            missing(&status("0000000000000000")).unwrap(),
            "CAP_NET_ADMIN and CAP_BPF and CAP_PERFMON"
        );
        assert_eq!(missing(&status("0000004000001000")).unwrap(), "CAP_BPF");
        assert_eq!(missing(&status("0000008000001000")).unwrap(), "CAP_PERFMON");
        assert_eq!(missing(&status("0000000000201000")), None);
    }
}
