//! All of a VM but its RAM: out of KVM, and into it.

use crate::serial::Serial;
use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// Says which release's state this is.
const MAGIC: u32 = 0x6b76_6d01;
const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

#[derive(Serialize, Deserialize)]
pub(crate) struct State {
    magic: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    commands: Vec<u8>,
}

/// Of a vCPU that stands.
pub(crate) fn save(vm: &VmFd, vcpu: &VcpuFd, serial: &Serial, msrs: &[u32]) -> Result<State> {
    let irqchips = IRQCHIPS.map(|chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..kvm_irqchip::default()
        };
        vm.get_irqchip(&mut chip).map(|()| chip)
    });
    Ok(State {
        magic: MAGIC,
        // Before the rest: KVM settles what is under way as it gives this out.
        mp: vcpu.get_mp_state().context("state of the processor")?,
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
        xsave: vcpu.get_xsave().context("floating point")?,
        debug: vcpu.get_debug_regs()?,
        events: vcpu.get_vcpu_events().context("pending events")?,
        lapic: vcpu.get_lapic().context("local APIC")?,
        msrs: readable(vcpu, msrs)?,
        irqchips: irqchips.into_iter().collect::<Result<_, _>>()?,
        pit: vm.get_pit2().context("timer")?,
        clock: vm.get_clock()?,
        commands: serial.pending(),
    })
}

/// Into a vCPU that stands and has never run.
#[allow(unsafe_code)]
pub(crate) fn load(state: &State, vm: &VmFd, vcpu: &VcpuFd, serial: &Serial) -> Result<()> {
    ensure!(state.magic == MAGIC, "the state is of another kvmm");
    vcpu.set_mp_state(state.mp)?;
    vcpu.set_regs(&state.regs)?;
    vcpu.set_sregs(&state.sregs).context("segments")?;
    // SAFETY: the structure is KVM's own, in the size that it gave out; no
    // feature with a larger one was enabled.
    unsafe { vcpu.set_xsave(&state.xsave) }.context("floating point")?;
    vcpu.set_debug_regs(&state.debug)?;
    // One at a time: some are read-only here, and then have no other value.
    for msr in &state.msrs {
        let one = Msrs::from_entries(std::slice::from_ref(msr))
            .map_err(|e| anyhow::anyhow!("a register: {e:?}"))?;
        if vcpu.set_msrs(&one).is_ok_and(|done| done == 1) {
            continue;
        }
        let here = readable(vcpu, &[msr.index])?;
        ensure!(
            here.first().is_some_and(|here| here.data == msr.data),
            "register {:#x} cannot be {:#x} here",
            msr.index,
            msr.data
        );
    }
    vcpu.set_lapic(&state.lapic).context("local APIC")?;
    for chip in &state.irqchips {
        vm.set_irqchip(chip).context("interrupt controllers")?;
    }
    vm.set_pit2(&state.pit).context("timer")?;
    let clock = kvm_clock_data {
        clock: state.clock.clock,
        ..kvm_clock_data::default()
    };
    vm.set_clock(&clock)?;
    vcpu.set_vcpu_events(&state.events)
        .context("pending events")?;
    serial.set_pending(&state.commands);
    Ok(())
}

/// Those registers that this vCPU has.
fn readable(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Vec<kvm_msr_entry>> {
    let mut found = Vec::new();
    for &index in msrs {
        let mut one = Msrs::from_entries(&[kvm_msr_entry {
            index,
            ..kvm_msr_entry::default()
        }])
        .map_err(|e| anyhow::anyhow!("a register: {e:?}"))?;
        if vcpu.get_msrs(&mut one).is_ok_and(|got| got == 1) {
            found.extend_from_slice(one.as_slice());
        }
    }
    Ok(found)
}
