//! The prefix-aware router: the choice of a replica as a pure function, and the proxy around it.

pub mod choice;
