use super::*;

#[test]
fn the_vdso_of_a_process_has_a_syscall_instruction() {
    let me = VmProcess::open(std::process::id() as i32).unwrap();
    find_syscall(&me).unwrap();
    check_program(&me).unwrap();
}

#[test]
fn only_the_two_bytes_count() {
    assert_eq!(find_syscall_bytes(&[0x0f, 0x0f, 0x05, 0xc3]), Some(1));
    assert_eq!(find_syscall_bytes(&[0x0f]), None);
    assert_eq!(find_syscall_bytes(&[0x05, 0x0f]), None);
}
