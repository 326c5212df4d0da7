//! Which instructions a processor has, by the names that operators know. CRIU decides whether a processor will do; this
//! says what it lacks.

use std::collections::BTreeSet;
use std::io;

/// Flags of `/proc/cpuinfo` that are instructions a program may use. The others are about the kernel or the host.
const EXACT: [&str; 30] = [
    "abm",
    "adx",
    "aes",
    "bmi1",
    "bmi2",
    "clflushopt",
    "clwb",
    "cx16",
    "erms",
    "f16c",
    "fma",
    "fsgsbase",
    "gfni",
    "lahf_lm",
    "movbe",
    "movdir64b",
    "movdiri",
    "pclmulqdq",
    "pku",
    "pni",
    "popcnt",
    "rdpid",
    "rdrand",
    "rdseed",
    "serialize",
    "sha_ni",
    "ssse3",
    "vaes",
    "vpclmulqdq",
    "waitpkg",
];
/// Families of such flags.
const PREFIXES: [&str; 4] = ["amx_", "avx", "sse", "xsave"];

/// The instruction sets of this host's processor.
pub fn instructions_here() -> io::Result<Vec<String>> {
    Ok(instructions(&std::fs::read_to_string("/proc/cpuinfo")?))
}

/// What is in `wanted` and not in `here`.
pub fn missing(wanted: &[String], here: &[String]) -> Vec<String> {
    let here: BTreeSet<_> = here.iter().collect();
    wanted.iter().filter(|name| !here.contains(name)).cloned().collect()
}

fn instructions(cpuinfo: &str) -> Vec<String> {
    // `flags` on x86, `Features` on Arm, where every one of them is an instruction set.
    let of = |key: &str| cpuinfo.lines().find_map(|line| Some(line.strip_prefix(key)?.split_once(':')?.1));
    if let Some(features) = of("Features") {
        return features.split_whitespace().map(str::to_owned).collect();
    }
    let flags = of("flags").unwrap_or_default().split_whitespace();
    let is_one = |flag: &&str| EXACT.contains(flag) || PREFIXES.iter().any(|prefix| flag.starts_with(prefix));
    flags.filter(is_one).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_picked_out_of_the_flags() {
        let x86 =
            "processor\t: 0\nflags\t\t: fpu sse2 hypervisor avx2 avx512f pti sha_ni\n\nprocessor\t: 1\n";
        assert_eq!(instructions(x86), ["sse2", "avx2", "avx512f", "sha_ni"]);
        assert_eq!(instructions("processor\t: 0\nFeatures\t: fp asimd sve\n"), ["fp", "asimd", "sve"]);
    }

    #[test]
    fn what_is_missing_is_named() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(missing(&names(&["sse2", "avx2", "avx512f"]), &names(&["avx2", "sse2"])), ["avx512f"]);
        assert_eq!(missing(&instructions_here().unwrap(), &instructions_here().unwrap()), [""; 0]);
    }
}
