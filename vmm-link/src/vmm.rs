//! What a VMM does for the link.

use std::error::Error;
use std::io::{Read, Write};

/// What went wrong inside the VMM; its words reach the operator.
pub type CallError = Box<dyn Error + Send + Sync>;

/// What the agent asks of a VMM, one call at a time, from the link's thread.
pub trait Vmm: Send {
    /// Whether vCPUs run.
    fn is_running(&mut self) -> bool;

    /// Stops the vCPUs, and then waits for all I/O into guest RAM and marks it
    /// (see [`Marks`](crate::Marks)): after this returns, nothing may write
    /// there. Returns whether the guest was running.
    ///
    /// # Errors
    /// It runs on as if it had not been asked.
    fn pause(&mut self) -> Result<bool, CallError>;

    /// Lets the guest run. Also the first time, after [`Vmm::load_state`], and
    /// if it runs already.
    ///
    /// # Errors
    /// It stands still.
    fn resume(&mut self) -> Result<(), CallError>;

    /// Writes all state but guest RAM: vCPUs, interrupt controllers, devices.
    /// Called only while paused, and may be called again: the guest must be able
    /// to run on here afterwards. Must not write guest RAM.
    ///
    /// # Errors
    /// The VM stays here.
    fn save_state(&mut self, out: &mut dyn Write) -> Result<(), CallError>;

    /// Takes state in, to its end; guest RAM is in place. Writes nothing there,
    /// and does not let the guest run.
    ///
    /// # Errors
    /// The VM does not come here; the agent ends this VMM.
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), CallError>;

    /// The VM lives elsewhere, or nowhere: the process has to end. The last
    /// call; the socket is not served any more.
    fn end(&mut self);

    /// Makes each running vCPU leave `KVM_RUN` once, soon; for dirty rings only:
    /// processors that note writes by themselves (PML) give their notes to
    /// the ring when the vCPU leaves the guest. Returns when all have left.
    fn kick(&mut self);

    /// Something went wrong between agent and VMM that nobody else hears of. For
    /// the VMM's log.
    fn note(&mut self, error: &(dyn Error + 'static)) {
        let _quiet = error;
    }
}
