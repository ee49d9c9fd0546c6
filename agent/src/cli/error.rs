//! Errors as the operator sees them, and exit codes.

use crate::api::ClientError;
use crate::config::Problems;

/// Exit code of the process. Part of the interface: scripts depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// Done; of a migration: every VM arrived.
    Ok = 0,
    /// Not done, or not wholly: some VM did not arrive.
    Failed = 1,
    /// The command line, a configuration or a plan is wrong.
    Usage = 2,
    /// No agent answers.
    Unreachable = 3,
    /// The agent does not let this user do that.
    Forbidden = 4,
    /// Interrupted (Ctrl-C), and so cancelled.
    Interrupted = 130,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        (code as u8).into()
    }
}

/// What went wrong, what to do, and how to exit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CliError {
    /// What went wrong, with causes.
    pub error: String,
    /// What to do about it; may be empty.
    pub remedy: String,
    /// The exit code.
    pub code: ExitCode,
}

impl CliError {
    /// Something was tried and failed.
    pub fn failed(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        CliError {
            error: error.into(),
            remedy: remedy.into(),
            code: ExitCode::Failed,
        }
    }

    /// The operator's input is wrong.
    pub fn usage(error: impl Into<String>, remedy: impl Into<String>) -> Self {
        CliError {
            code: ExitCode::Usage,
            ..Self::failed(error, remedy)
        }
    }

    /// The text for standard error.
    pub fn render(&self) -> String {
        if self.remedy.is_empty() {
            return format!("error: {}", self.error);
        }
        format!("error: {}\n  {}", self.error, self.remedy)
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let code = match &error {
            ClientError::Refused { status: 400, .. } => ExitCode::Usage,
            ClientError::Refused { status: 403, .. } | ClientError::NotAdmitted { .. } => {
                ExitCode::Forbidden
            }
            ClientError::Refused { .. } | ClientError::Unreadable(_) => ExitCode::Failed,
            _ => ExitCode::Unreachable,
        };
        CliError {
            error: with_causes(&error),
            remedy: error.remedy(),
            code,
        }
    }
}

impl From<Problems> for CliError {
    fn from(problems: Problems) -> Self {
        let count = problems.problems.len();
        let many = if count == 1 { "problem" } else { "problems" };
        CliError::usage(format!("{count} {many} found\n{problems}"), "")
    }
}

/// An error with its sources, in one line.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
