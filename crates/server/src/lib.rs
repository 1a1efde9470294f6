//! One replica: HTTP, admission, the engine thread, streams, drain.
