//! Asking CRIU whether it can work here, and whether a processor will do for what has run on another. Each question is a
//! process of its own that takes a tenth of a second, so the answers are kept.

use std::io;
use std::path::Path;
use std::process::{Output, Stdio};

use tokio::process::Command;

use super::log;
use super::program::Program;

/// CRIU's image of a processor, in the folder that it is given.
const PROCESSOR_IMAGE: &str = "cpuinfo.img";

/// Why CRIU is of no use.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It does not start.
    #[error(
        "start {program}: is CRIU 4.2 or newer installed (`cargo xtask setup`), or named in the agent's `criu`?"
    )]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says so itself.
    #[error("`criu {what}` fails: {said}")]
    Failed {
        /// What it was asked.
        what: &'static str,
        /// The lines of its log that matter.
        said: String,
    },
    /// A file of its.
    #[error("CRIU's image of the processor cannot be read or written")]
    Image(#[from] io::Error),
}

/// Whether this kernel has what CRIU needs.
pub async fn can_work(program: &Program) -> Result<(), CheckError> {
    run(program, "check", None).await
}

/// What CRIU says of this processor. `folder` is an empty one for its files.
pub async fn processor(program: &Program, folder: &Path) -> Result<Vec<u8>, CheckError> {
    run(program, "cpuinfo dump", Some(folder)).await?;
    Ok(std::fs::read(folder.join(PROCESSOR_IMAGE))?)
}

/// Whether this processor has what the one of `image` has.
pub async fn processor_fits(program: &Program, folder: &Path, image: &[u8]) -> Result<(), CheckError> {
    std::fs::write(folder.join(PROCESSOR_IMAGE), image)?;
    run(program, "cpuinfo check", Some(folder)).await
}

async fn run(program: &Program, what: &'static str, folder: Option<&Path>) -> Result<(), CheckError> {
    let (name, leading) = program.argv().split_first().expect("a program is never empty");
    let mut command = Command::new(name);
    command.args(leading).args(what.split(' ')).stdin(Stdio::null()).kill_on_drop(true);
    if let Some(folder) = folder {
        command.arg("--images-dir").arg(folder);
    }
    let failed = |source| CheckError::Start { program: name.clone(), source };
    let Output { status, stdout, stderr } = command.output().await.map_err(failed)?;
    if status.success() {
        return Ok(());
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Err(CheckError::Failed { what, said: said(&text(&stderr), &text(&stdout)) })
}

/// CRIU's reasons, or the last that it said.
fn said(stderr: &str, stdout: &str) -> String {
    let errors = log::lines_that_matter(stderr);
    if !errors.is_empty() {
        return errors.join("; ");
    }
    let last =
        |text: &str| text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned);
    last(stderr).or_else(|| last(stdout)).unwrap_or_else(|| "it does not say why".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_found() {
        let log = "Warn  (criu/kerndat.c:1): x\nError (criu/cr-check.c:7): Kernel lacks y.\n";
        assert_eq!(said(log, "Looks bad."), "Kernel lacks y. (criu/cr-check.c:7)");
        assert_eq!(said("criu: not found\n\n", ""), "criu: not found");
        assert_eq!(said("", ""), "it does not say why");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let program = Program::find(Some(&["/nonexistent/criu".to_owned()]));
        let error = can_work(&program).await.unwrap_err();
        let text = crate::client::chain(&error);
        assert!(text.starts_with("start /nonexistent/criu: ") && text.contains("No such file"), "{text}");
    }
}
