//! Texts written by hand.

use super::Add;

pub(super) fn seeds(add: Add<'_>) {
    for (target, name, text) in TEXTS {
        add(target, name, text.as_bytes().to_vec());
    }
}

/// An agent's certificate; nobody has its key.
const AGENT_PEM: &str = "\
-----BEGIN CERTIFICATE-----\n\
MIIBxjCCAW6gAwIBAgIUD2GvNjf4ZswAfnBPKxs94zCqD8swCgYIKoZIzj0EAwIw\n\
GjEYMBYGA1UEAwwPRHJvdmVyIGFnZW50IGExMB4XDTI2MTEyNjEyMDY1N1oXDTM2\n\
MTEyMzEyMDY1N1owGjEYMBYGA1UEAwwPRHJvdmVyIGFnZW50IGExMFkwEwYHKoZI\n\
zj0CAQYIKoZIzj0DAQcDQgAEHZt5zqEgK2RwrsFbEKkpE6TqokWIT73fbWDhNuv8\n\
6s3ITKnC2BC3a1r2Qciwv63tPYBlEs+0HRgQbjXRAJ+nhqOBkTCBjjAdBgNVHQ4E\n\
FgQUMWJ3fdEdE/kCrlGMafPgsvxOEMcwHwYDVR0jBBgwFoAUMWJ3fdEdE/kCrlGM\n\
afPgsvxOEMcwDwYDVR0TAQH/BAUwAwEB/zAcBgNVHREEFTAThhFkcm92ZXI6Ly9h\n\
Z2VudC9hMTAdBgNVHSUEFjAUBggrBgEFBQcDAQYIKwYBBQUHAwIwCgYIKoZIzj0E\n\
AwIDRgAwQwIgEX0EanFxeKdsJdohhzCUjuVNIQFKzchF7NbdI4cBQ/YCH2cB2/Zr\n\
UTijVW7zxF0rLKL8qSuDwbUFxBz3BAG7Sw4=\n\
-----END CERTIFICATE-----\n\
";

const TEXTS: &[(&str, &str, &str)] = &[
    ("certificates", "agent.pem", AGENT_PEM),
    (
        "config_files",
        "agent-plaintext.toml",
        "name = \"a\"\nrack = \"A\"\nlisten = \"[::1]:7400\"\nstate_dir = \"s\"\nrun_dir = \"r\"\nram_dir = \"m\"\n\
         secret_file = \"k\"\npolicy = \"p\"\nvm_definitions = \"v\"\n[tls]\nplaintext = true\n",
    ),
    (
        "vm_files",
        "vm-json-argument.toml",
        "name = \"w.1\"\ndomain = \"t\"\nkind = \"qemu-direct\"\nram = \"64M\"\n[qemu]\nbinary = \"/q\"\n\
         args = ['{\"qom-type\":\"x\",\"path\":\"{ram}\"}', \"{nic_0}\"]\n",
    ),
    ("values", "size", "262136K"),
    ("values", "size-unit", "4GiB"),
    ("values", "bytes", "256 MiB"),
    ("values", "prefix-4", "10.1.0.0/16"),
    ("values", "prefix-6", "fd00:1::/64"),
    ("values", "host", "255.255.255.255"),
    ("values", "name", "web-1.b_2"),
    ("values", "profile", "evacuate"),
    (
        "json",
        "qmp-greeting",
        "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"Debian\"}, \
         \"capabilities\": [\"oob\"]}}\r\n{\"return\": {}, \"id\": 1}\r\n",
    ),
    (
        "json",
        "qmp-event",
        "{\"timestamp\": {\"seconds\": 5, \"microseconds\": 7}, \"event\": \"MIGRATION\", \
         \"data\": {\"status\": \"completed\"}}\r\n\r\n{\"return\": null}\n",
    ),
    (
        "json",
        "qmp-error",
        "{\"id\": 1, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}",
    ),
    (
        "host_text",
        "maps",
        "7f5e40000000-7f5e50000000 rw-s 00010000 00:1a 4711   /dev/shm/vm one.ram (deleted)\n\
         7fff12345000-7fff12347000 r-xp 00000000 00:00 0                          [vdso]\n\
         55d0c0000000-55d0c0021000 rw-p 00000000 fe:01 99 \n",
    ),
    (
        "host_text",
        "stat",
        "7 (a) b (c) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4242 9 9\n",
    ),
    (
        "host_text",
        "status",
        "Name:\tqemu-system-x86\nState:\tS (sleeping)\nTracerPid:\t0\nVmLck:\t       0 kB\n",
    ),
    (
        "host_text",
        "ramblocks",
        "              Block Name    PSize              Offset               Used              Total\r\n\
         \x20                    ram    4 KiB  0x0000000000000000 0x0000000001000000 0x0000000001000000\r\n\
         \x20   /rom@etc/acpi/tables    2 MiB  0x0000000001080000 0x0000000000020000 0x0000000000200000\r\n",
    ),
    (
        "host_text",
        "qtree",
        "bus: main-system-bus\r\n  type System\r\n  dev: q35-pcihost, id \"\"\r\n    bus: pcie.0\r\n\
         \x20     dev: vfio-pci, id \"gpu 1\"\r\n        addr = 02.0\r\n",
    ),
];
