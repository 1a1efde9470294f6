//! What each word of a report means. The same words mean other things in other tools, so that every report says it.

/// Word and meaning, in the order in which a report shows them.
pub const DEFINITIONS: &[(&str, &str)] = &[
    (
        "TTFT",
        "from the scheduled arrival of a request to its first content, reasoning or tool delta that is not empty",
    ),
    (
        "TTFT from send",
        "the same from the moment the client began to send, before a connection was opened; what tools report that \
         wait with sending",
    ),
    (
        "TPOT",
        "(last token - first token) / (output tokens - 1) of a request; output tokens from the server's usage",
    ),
    ("ITL", "every gap between two successive deltas that are not empty, all requests pooled"),
    ("E2EL", "from the scheduled arrival to the last token"),
    (
        "send lag",
        "from the moment a request was due to the moment it was sent; a p99 above 5 ms, or above 1 % of the median \
         TTFT, makes the run client-bound",
    ),
    (
        "read lag",
        "from the arrival of bytes in the kernel to their being read; latencies are taken from the arrival where the \
         kernel tells it",
    ),
    (
        "throughput",
        "what arrived within the measured window, a second; a request counts by the share of its tokens that did; the \
         window goes from the first measured arrival to the end of the last measured request, with the load kept up around it unless the \
         workload belongs together",
    ),
    ("goodput", "requests a second that kept every limit of the SLO; a failed request kept none"),
    ("failures", "are counted by class, stay in the denominator, and have no latency"),
    ("percentiles", "interpolate linearly between the nearest ranks (numpy's default)"),
    ("+/-", "half the width of the 95 % interval of the mean over the repeats (Student's t)"),
    (
        "Little's law",
        "mean in flight, counted live, against arrival rate x mean residence from the records, over the whole repeat; \
         they must agree within 2 %",
    ),
];
