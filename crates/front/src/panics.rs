//! A handler that panicked: what the log is to say of it.

use std::any::Any;

/// What a panic carries, for the error that the log shows.
pub fn describe(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    format!("a handler panicked: {text}")
}
