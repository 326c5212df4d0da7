//! Whatever is in a configuration file, it is taken or refused with errors that can be shown; never a panic.
#![no_main]

use lb::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(errors) = Config::parse(text, "lb.toml") {
        assert!(!errors.to_string().is_empty(), "a refusal says why");
    }
});
