//! The eBPF toolchain: a compiler with a core library for `bpfel-unknown-none`, and bpf-linker.
//!
//! Two are known: rustup's nightly, which builds the core library from source, and Debian's own compiler, which brings it
//! built. Whichever is taken has built a small program here before it is written down.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{State, announce, debian, tools};
use crate::{cache, shell};

/// Debian's compiler for browsers: new, and with libraries for eBPF; and the LLVM of the same version for bpf-linker.
const PACKAGES: &[&str] =
    &["rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev", "libpolly-22-dev", "libzstd-dev", "zlib1g-dev"];
/// Where Debian's compiler is, whatever else is on PATH.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Where Debian's LLVM is; the version has to be the compiler's.
const LLVM: (&str, &str) = ("LLVM_PREFIX", "/usr/lib/llvm-22");
const LLVM_FEATURE: &str = "llvm-22";
const LINKER_VERSION: &str = "0.13.0";

const ELSEWHERE: &str = "Without Debian's packages: `rustup toolchain install nightly --component rust-src`, \
                         then `cargo install bpf-linker`";

/// A way to build for the kernel.
struct Toolchain {
    kind: &'static str,
    cargo_arguments: &'static str,
    build_std: bool,
    rustc: &'static str,
    linker: PathBuf,
}

impl Toolchain {
    fn nightly(linker: PathBuf) -> Toolchain {
        Toolchain { kind: "nightly", cargo_arguments: "+nightly", build_std: true, rustc: "", linker }
    }

    fn debian(linker: PathBuf) -> Toolchain {
        Toolchain { kind: "debian", cargo_arguments: "", build_std: false, rustc: DEBIAN_RUSTC, linker }
    }

    fn describe(&self) -> String {
        let compiler = match self.kind {
            "nightly" => "rustup's nightly".to_owned(),
            _ => format!("Debian's {}", shell::answer(DEBIAN_RUSTC, &["--version"]).unwrap_or_default()),
        };
        format!("{compiler}, {}", self.linker.display())
    }

    fn text(&self) -> String {
        format!(
            "KIND={}\nCARGO_ARGS={}\nBUILD_STD={}\nRUSTC={}\nLINKER={}\n",
            self.kind,
            self.cargo_arguments,
            u8::from(self.build_std),
            self.rustc,
            self.linker.display()
        )
    }

    /// Builds a program that does nothing, the way lb's build script builds ours.
    fn try_out(&self) -> Result<()> {
        let folder = cache::folder()?.join("ebpf-try");
        let source = folder.join("src");
        fs::create_dir_all(&source).with_context(|| format!("cannot create {}", source.display()))?;
        cache::write(&folder.join("Cargo.toml"), TRY_MANIFEST)?;
        cache::write(&source.join("main.rs"), TRY_SOURCE)?;
        let mut cargo = Command::new("cargo");
        cargo.args(self.cargo_arguments.split_whitespace());
        cargo.args(["build", "--release", "--target", "bpfel-unknown-none"]);
        if self.build_std {
            cargo.args(["-Z", "build-std=core"]);
        }
        for inherited in
            ["RUSTC", "RUSTFLAGS", "CARGO_TARGET_DIR", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN"]
        {
            cargo.env_remove(inherited);
        }
        if !self.rustc.is_empty() {
            cargo.env("RUSTC", self.rustc);
        }
        cargo.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", "-C link-arg=--btf -C debuginfo=2");
        cargo.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker).current_dir(&folder);
        let built = shell::run_quiet(&mut cargo).map(drop);
        let _ = fs::remove_dir_all(&folder);
        built
    }
}

const TRY_MANIFEST: &str = "[package]\nname = \"ebpf-try\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n\
                            [profile.release]\npanic = \"abort\"\n\n[workspace]\n";
const TRY_SOURCE: &str = "#![no_std]\n#![no_main]\n\n\
    #[unsafe(no_mangle)]\n#[unsafe(link_section = \"xdp\")]\npub extern \"C\" fn pass(_: usize) -> u32 {\n    2\n}\n\n\
    #[panic_handler]\nfn panic(_: &core::panic::PanicInfo) -> ! {\n    loop {}\n}\n";

/// Finds the toolchain or installs Debian's.
pub(super) fn provide() -> State {
    match find_or_install() {
        Ok(state) => state,
        Err(error) => State::Missing(format!("{error:#}\n{ELSEWHERE}")),
    }
}

fn find_or_install() -> Result<State> {
    let file = cache::folder()?.join("ebpf-toolchain");
    if let Some(known) = known(&file) {
        return Ok(State::Found(known.describe()));
    }
    if let Some(nightly) = nightly() {
        announce("trying rustup's nightly for eBPF");
        match nightly.try_out() {
            Ok(()) => {
                cache::write(&file, &nightly.text())?;
                return Ok(State::Found(nightly.describe()));
            }
            Err(error) => announce(&format!("it does not work, looking further: {error:#}")),
        }
    }
    install_debian(&file)
}

/// The toolchain written down earlier, if all of it is still there.
fn known(file: &Path) -> Option<Toolchain> {
    let text = fs::read_to_string(file).ok()?;
    let values: BTreeMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let linker = PathBuf::from(values.get("LINKER")?);
    let toolchain = match *values.get("KIND")? {
        "nightly" => Toolchain::nightly(linker),
        "debian" => Toolchain::debian(linker),
        _ => return None,
    };
    let has_compiler = if toolchain.build_std { has_nightly_source() } else { has_debian_core() };
    // The linker is asked for its version, since it fails to start where its LLVM is gone.
    let is_whole = has_compiler && shell::answer(&toolchain.linker, &["--version"]).is_some();
    (is_whole && toolchain.text() == text).then_some(toolchain)
}

fn nightly() -> Option<Toolchain> {
    let linker = shell::which("bpf-linker")?;
    has_nightly_source().then(|| Toolchain::nightly(linker))
}

fn has_nightly_source() -> bool {
    shell::answer("rustup", &["run", "nightly", "rustc", "--print", "sysroot"])
        .is_some_and(|root| Path::new(&root).join("lib/rustlib/src/rust/library/core").is_dir())
}

fn has_debian_core() -> bool {
    shell::answer(DEBIAN_RUSTC, &["--target", "bpfel-unknown-none", "--print", "target-libdir"])
        .and_then(|folder| fs::read_dir(folder).ok())
        .is_some_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|found| found.file_name().to_string_lossy().starts_with("libcore"))
            })
        })
}

fn install_debian(file: &Path) -> Result<State> {
    let absent: Vec<_> = PACKAGES.iter().copied().filter(|package| !debian::is_installed(package)).collect();
    if !absent.is_empty() {
        announce(&format!("installing {} (about half a minute)", absent.join(", ")));
        debian::install(&absent)?;
    }
    if !has_debian_core() {
        bail!(
            "{DEBIAN_RUSTC} has no core library for bpfel-unknown-none in spite of the packages {PACKAGES:?}"
        );
    }
    let linker = cache::tools()?.join("bin/bpf-linker");
    if shell::answer(&linker, &["--version"]).is_none() {
        let flags = ["--no-default-features", "--features", LLVM_FEATURE, "--force"];
        tools::install("bpf-linker", LINKER_VERSION, &flags, &[LLVM])?;
    }
    let toolchain = Toolchain::debian(linker);
    toolchain.try_out()?;
    cache::write(file, &toolchain.text())?;
    Ok(State::Installed(toolchain.describe()))
}
