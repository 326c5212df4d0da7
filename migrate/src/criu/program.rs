//! Which CRIU is run: the configured one, else `$DROVER_CRIU`, else the one that `cargo xtask setup` chose
//! (it leaves the command in the cache folder, one argument a line), else `criu`.

use std::path::PathBuf;

/// The environment variable that names a CRIU: program and leading arguments, separated by spaces.
const VARIABLE: &str = "DROVER_CRIU";

/// CRIU's program and leading arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program(Vec<String>);

impl Program {
    /// The CRIU to use.
    pub fn find(configured: Option<&[String]>) -> Self {
        let cached = || std::fs::read_to_string(cache_folder()?.join("criu.cmd")).ok();
        Self::choose(configured, std::env::var(VARIABLE).ok().as_deref(), cached)
    }

    fn choose(
        configured: Option<&[String]>,
        variable: Option<&str>,
        cached: impl FnOnce() -> Option<String>,
    ) -> Self {
        let words = |text: &str, split: fn(char) -> bool| -> Option<Vec<String>> {
            let words: Vec<String> =
                text.split(split).map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect();
            (!words.is_empty()).then_some(words)
        };
        let argv = configured
            .filter(|argv| !argv.is_empty())
            .map(<[String]>::to_vec)
            .or_else(|| words(variable?, |c| c == ' '))
            .or_else(|| words(&cached()?, |c| c == '\n'))
            .unwrap_or_else(|| vec!["criu".to_owned()]);
        Self(argv)
    }

    /// Program and leading arguments; never empty.
    pub fn argv(&self) -> &[String] {
        &self.0
    }
}

fn cache_folder() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("drover"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearer_word_wins() {
        let cached = || Some("/c/ld.so\n--library-path\n/c/lib\n/c/criu\n".to_owned());
        let configured = ["/x/criu".to_owned()];
        let argv = |program: Program| program.0.join(" ");
        assert_eq!(argv(Program::choose(Some(&configured), Some("/e/criu"), cached)), "/x/criu");
        assert_eq!(argv(Program::choose(None, Some("/e/ld.so  /e/criu"), cached)), "/e/ld.so /e/criu");
        assert_eq!(argv(Program::choose(None, None, cached)), "/c/ld.so --library-path /c/lib /c/criu");
        assert_eq!(argv(Program::choose(None, Some(" "), || None)), "criu");
        assert_eq!(argv(Program::choose(Some(&[]), None, || None)), "criu");
    }
}
