//! The policy file as it is written: its keys, their defaults and ranges.

use super::{
    Compress, CompressMode, Limits, MeterPolicy, Policy, PolicyProblem, Profile, ProfileName,
    Rounds, Then,
};
use serde::Deserialize;
use std::ops::RangeInclusive;
use std::time::Duration;
use toml::Spanned;

/// Wire bytes per second in one Mbit/s.
const MBIT: f64 = 125_000.0;
const MIB: u64 = 1024 * 1024;

type Key<T> = Option<Spanned<T>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    profile: Option<ProfileName>,
    core_link: Spanned<CoreLink>,
    #[serde(default)]
    profiles: Profiles,
    #[serde(default)]
    rounds: RoundsKeys,
    #[serde(default)]
    limits: LimitsKeys,
    #[serde(default)]
    compress: CompressKeys,
    #[serde(default)]
    meter: MeterKeys,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CoreLink {
    capacity_mbit: Spanned<f64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Profiles {
    #[serde(default)]
    background: ProfileKeys,
    #[serde(default)]
    normal: ProfileKeys,
    #[serde(default)]
    urgent: ProfileKeys,
    #[serde(default)]
    evacuate: ProfileKeys,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct ProfileKeys {
    share_percent: Key<f64>,
    floor_percent: Key<f64>,
    headroom_percent: Key<f64>,
    reaction_ms: Key<u64>,
    probe_ms: Key<u64>,
    queue_ms: Key<f64>,
    stop_copy_percent: Key<f64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RoundsKeys {
    max_rounds: Key<u64>,
    max_precopy_s: Key<u64>,
    stuck_percent: Key<u64>,
    stuck_rounds: Key<u64>,
    then: Option<Then>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct LimitsKeys {
    scan_threads: Key<u64>,
    lanes_per_pair: Key<u64>,
    side_cache_mib: Key<u64>,
    claim_deadline_ms: Key<u64>,
    fetch_deadline_ms: Key<u64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct CompressKeys {
    mode: Option<CompressMode>,
    level: Key<i64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct MeterKeys {
    required: Option<bool>,
    report_ms: Key<u64>,
}

/// The values of keys that are left out, as `configs/policy.toml` shows them.
const fn default_profile(name: ProfileName) -> Profile {
    let (share, floor, headroom, reaction_ms, probe_ms, queue_us, stop_copy) = match name {
        ProfileName::Background => (0.60, 0.01, 0.10, 500, 3000, 500, 0.60),
        ProfileName::Normal => (0.97, 0.04, 0.04, 200, 1000, 1000, 0.60),
        ProfileName::Urgent => (0.98, 0.40, 0.02, 100, 300, 10_000, 0.98),
        ProfileName::Evacuate => (1.00, 1.00, 0.00, 100, 100, 0, 1.00),
    };
    Profile {
        share,
        floor,
        headroom,
        reaction: Duration::from_millis(reaction_ms),
        probe: Duration::from_millis(probe_ms),
        queue: match queue_us {
            0 => None,
            us => Some(Duration::from_micros(us)),
        },
        stop_copy,
    }
}

/// Reads a policy. Pure: it touches nothing but `text`.
///
/// # Errors
/// The first problem found: bad TOML, an unknown or missing key, a value of
/// the wrong type or out of its range, or values that contradict each other.
pub fn parse(text: &str) -> Result<Policy, PolicyProblem> {
    let file: File = toml::from_str(text).map_err(|error| refused(text, &error))?;
    let reader = Reader { text };
    let profiles = file.profiles;
    let capacity = file.core_link.into_inner().capacity_mbit;
    Ok(Policy {
        profile: file.profile.unwrap_or(ProfileName::Normal),
        capacity: MBIT
            * reader.within("core_link.capacity_mbit", Some(capacity), 0.0, 1.0..=1e7)?,
        profiles: [
            reader.profile(ProfileName::Background, profiles.background)?,
            reader.profile(ProfileName::Normal, profiles.normal)?,
            reader.profile(ProfileName::Urgent, profiles.urgent)?,
            reader.profile(ProfileName::Evacuate, profiles.evacuate)?,
        ],
        rounds: reader.rounds(file.rounds)?,
        limits: reader.limits(file.limits)?,
        compress: Compress {
            mode: file.compress.mode.unwrap_or(CompressMode::Auto),
            level: reader.within("compress.level", file.compress.level, 1, -7..=19)? as i32,
        },
        meter: MeterPolicy {
            required: file.meter.required.unwrap_or(true),
            report: reader.millis("meter.report_ms", file.meter.report_ms, 50, 10..=1000)?,
        },
    })
}

/// What the TOML parser did not like, in our form.
fn refused(text: &str, error: &toml::de::Error) -> PolicyProblem {
    let message = error.message().trim().replace('\n', " ");
    let remedy = if message.starts_with("unknown field") {
        "correct or remove the key: only those of configs/policy.toml exist"
    } else if message.starts_with("unknown variant") {
        "use one of the names listed"
    } else if message.starts_with("missing field") {
        "add it; configs/policy.toml shows where it goes"
    } else if message.starts_with("invalid type") {
        "write the value as configs/policy.toml does"
    } else {
        "correct the line; the file is TOML, as configs/policy.toml shows"
    };
    PolicyProblem {
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        problem: message,
        remedy: remedy.to_owned(),
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Checks values against their ranges.
struct Reader<'a> {
    text: &'a str,
}

impl Reader<'_> {
    fn within<T>(
        &self,
        key: &str,
        value: Key<T>,
        default: T,
        range: RangeInclusive<T>,
    ) -> Result<T, PolicyProblem>
    where
        T: PartialOrd + std::fmt::Display,
    {
        let Some(value) = value else {
            return Ok(default);
        };
        if !range.contains(value.get_ref()) {
            return Err(PolicyProblem {
                line: line_of(self.text, value.span().start),
                problem: format!("{key} = {} is out of range", value.get_ref()),
                remedy: format!("set it from {} to {}", range.start(), range.end()),
            });
        }
        Ok(value.into_inner())
    }

    fn millis(
        &self,
        key: &str,
        value: Key<u64>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Result<Duration, PolicyProblem> {
        Ok(Duration::from_millis(
            self.within(key, value, default, range)?,
        ))
    }

    fn profile(&self, name: ProfileName, keys: ProfileKeys) -> Result<Profile, PolicyProblem> {
        let key = |last: &str| format!("profiles.{name}.{last}");
        let default = default_profile(name);
        let share_of = |last: &str, value: Key<f64>, default: f64, range| {
            let percent = self.within(&key(last), value, default * 100.0, range)?;
            Ok(percent / 100.0)
        };
        let floor_line = keys.floor_percent.as_ref().or(keys.share_percent.as_ref());
        let floor_line = floor_line.map_or(1, |value| line_of(self.text, value.span().start));

        let queue_ms = default.queue.map_or(0.0, |queue| queue.as_secs_f64() * 1e3);
        let queue_ms = self.within(&key("queue_ms"), keys.queue_ms, queue_ms, 0.0..=1000.0)?;
        let profile = Profile {
            share: share_of(
                "share_percent",
                keys.share_percent,
                default.share,
                1.0..=100.0,
            )?,
            // At nothing a migration under load would never end.
            floor: share_of(
                "floor_percent",
                keys.floor_percent,
                default.floor,
                0.1..=100.0,
            )?,
            headroom: share_of(
                "headroom_percent",
                keys.headroom_percent,
                default.headroom,
                0.0..=90.0,
            )?,
            reaction: self.millis(
                &key("reaction_ms"),
                keys.reaction_ms,
                default.reaction.as_millis() as u64,
                20..=60_000,
            )?,
            probe: self.millis(
                &key("probe_ms"),
                keys.probe_ms,
                default.probe.as_millis() as u64,
                20..=600_000,
            )?,
            queue: (queue_ms > 0.0).then(|| Duration::from_secs_f64(queue_ms / 1e3)),
            stop_copy: share_of(
                "stop_copy_percent",
                keys.stop_copy_percent,
                default.stop_copy,
                1.0..=100.0,
            )?,
        };
        if profile.floor > profile.share {
            return Err(PolicyProblem {
                line: floor_line,
                problem: format!(
                    "{} = {} is more than {} = {}",
                    key("floor_percent"),
                    profile.floor * 100.0,
                    key("share_percent"),
                    profile.share * 100.0
                ),
                remedy: "lower the floor or raise the share".to_owned(),
            });
        }
        Ok(profile)
    }

    fn rounds(&self, keys: RoundsKeys) -> Result<Rounds, PolicyProblem> {
        Ok(Rounds {
            max_rounds: self.within("rounds.max_rounds", keys.max_rounds, 30, 1..=10_000)? as u32,
            max_precopy: Duration::from_secs(self.within(
                "rounds.max_precopy_s",
                keys.max_precopy_s,
                600,
                1..=604_800,
            )?),
            stuck_percent: self.within("rounds.stuck_percent", keys.stuck_percent, 90, 1..=100)?
                as u32,
            stuck_rounds: self.within("rounds.stuck_rounds", keys.stuck_rounds, 4, 1..=1000)?
                as u32,
            then: keys.then.unwrap_or(Then::Fail),
        })
    }

    fn limits(&self, keys: LimitsKeys) -> Result<Limits, PolicyProblem> {
        Ok(Limits {
            scan_threads: self.within("limits.scan_threads", keys.scan_threads, 2, 1..=256)? as u32,
            lanes_per_pair: self.within("limits.lanes_per_pair", keys.lanes_per_pair, 2, 1..=64)?
                as u32,
            side_cache_bytes: MIB
                * self.within(
                    "limits.side_cache_mib",
                    keys.side_cache_mib,
                    64,
                    0..=1_048_576,
                )?,
            claim_deadline: self.millis(
                "limits.claim_deadline_ms",
                keys.claim_deadline_ms,
                50,
                1..=10_000,
            )?,
            fetch_deadline: self.millis(
                "limits.fetch_deadline_ms",
                keys.fetch_deadline_ms,
                500,
                1..=60_000,
            )?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHOWN: &str = include_str!("../../../../configs/policy.toml");

    fn problem(text: &str) -> PolicyProblem {
        parse(text).expect_err("this policy is to be refused")
    }

    #[test]
    fn the_shown_file_says_what_leaving_keys_out_means() {
        let least = "[core_link]\ncapacity_mbit = 400\n";
        assert_eq!(parse(SHOWN), parse(least));
        let policy = parse(SHOWN).unwrap();
        assert_eq!(policy.capacity, 50e6);
        assert_eq!(policy.profile, ProfileName::Normal);
        assert_eq!(policy.profile(ProfileName::Evacuate).queue, None);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let text = SHOWN.replace("probe_ms = 1000", "prob_ms = 1000");
        let found = problem(&text);
        let line = text.lines().position(|l| l.starts_with("prob_ms")).unwrap() + 1;
        assert_eq!(found.line, line);
        assert!(found.problem.contains("prob_ms"), "{found}");
        assert!(found.remedy.contains("configs/policy.toml"), "{found}");
    }

    #[test]
    fn a_value_out_of_range_is_refused_with_the_range() {
        let found = problem("[core_link]\ncapacity_mbit = 400\n[limits]\n\nlanes_per_pair = 0\n");
        assert_eq!(found.line, 5);
        assert_eq!(found.problem, "limits.lanes_per_pair = 0 is out of range");
        assert_eq!(found.remedy, "set it from 1 to 64");
    }

    #[test]
    fn numbers_that_are_none_are_refused() {
        for value in ["nan", "inf", "-5", "0"] {
            let found = problem(&format!("[core_link]\ncapacity_mbit = {value}\n"));
            assert_eq!(found.line, 2, "{found}");
            assert!(found.problem.contains("out of range"), "{found}");
        }
    }

    #[test]
    fn a_missing_capacity_is_named() {
        let found = problem("profile = \"normal\"\n[core_link]\n");
        assert!(found.problem.contains("capacity_mbit"), "{found}");
        assert_eq!(found.line, 2);
        let found = problem("profile = \"normal\"\n");
        assert!(found.problem.contains("core_link"), "{found}");
    }

    #[test]
    fn a_wrong_type_and_a_wrong_name_are_refused_with_the_choices() {
        let found = problem("[core_link]\ncapacity_mbit = \"fast\"\n");
        assert_eq!(found.line, 2);
        assert!(found.problem.starts_with("invalid type"), "{found}");
        let found = problem("profile = \"quick\"\n[core_link]\ncapacity_mbit = 1\n");
        assert_eq!(found.line, 1);
        assert!(found.problem.contains("evacuate"), "{found}");
    }

    #[test]
    fn a_floor_above_the_share_is_refused() {
        let text = "[core_link]\ncapacity_mbit = 1\n[profiles.normal]\nshare_percent = 50\nfloor_percent = 60\n";
        let found = problem(text);
        assert_eq!(found.line, 5);
        assert!(found.remedy.contains("lower the floor"), "{found}");
    }

    #[test]
    fn broken_toml_is_refused_with_its_line() {
        assert_eq!(problem("[core_link]\ncapacity_mbit = = 4\n").line, 2);
    }

    proptest! {
        #[test]
        fn any_text_gives_a_policy_or_a_problem(text in ".{0,400}") {
            drop(parse(&text));
        }

        #[test]
        fn any_change_of_a_byte_gives_a_policy_or_a_problem(at in 0..SHOWN.len(), byte in 0x20u8..0x7f) {
            let mut bytes = SHOWN.as_bytes().to_vec();
            bytes[at] = byte;
            if let Ok(text) = String::from_utf8(bytes)
                && let Err(problem) = parse(&text) {
                prop_assert!(problem.line <= text.lines().count() + 1);
            }
        }
    }
}
