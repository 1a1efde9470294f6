//! Label values as closed enums, so that a series can neither be misspelt nor multiply without bound.

/// A label whose values are known when the program is compiled.
pub trait Label: Copy + 'static {
    /// The label's name on the series.
    const NAME: &'static str;
    /// Every value, in the order of [`Label::index`].
    const ALL: &'static [Self];
    /// The value as exported.
    fn value(self) -> &'static str;
    /// The position of this value in [`Label::ALL`].
    fn index(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident($label:literal) { $($(#[$variant_doc:meta])* $variant:ident = $value:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)+ }

        impl Label for $name {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
            fn value(self) -> &'static str {
                match self { $(Self::$variant => $value,)+ }
            }
            fn index(self) -> usize {
                self as usize
            }
        }
    };
}

label! {
    /// Why a request ended. Ordered from good to bad: a request of several choices ended for the
    /// greatest of their reasons.
    FinishedReason("finished_reason") {
        /// A stop token or a stop string.
        Stop = "stop",
        /// `max_tokens` or the context length.
        Length = "length",
        /// The client went away, or a drain timed out.
        Abort = "abort",
        /// The model failed.
        Error = "error",
    }
}

label! {
    /// Why a well-formed request was not taken.
    RejectionReason("reason") {
        EmptyPrompt = "empty_prompt",
        /// More choices than sequences that run at once.
        TooManyChoices = "too_many_choices",
        /// Prompt and `max_tokens` exceed the context.
        ContextLength = "context_length",
        /// The request needs more KV blocks than the pool has.
        NeverFits = "never_fits",
        QueueFull = "queue_full",
        /// Counted by connection: its request is not read.
        TooManyConnections = "too_many_connections",
        /// The replica is shutting down.
        Draining = "draining",
        /// The model is not loaded yet, or its device was lost.
        NotReady = "not_ready",
    }
}

label! {
    /// What a model's memory holds.
    MemoryPart("part") {
        Weights = "weights",
        /// Those of the largest step.
        Activations = "activations",
        KvCache = "kv_cache",
    }
}

label! {
    /// What loading a model spends its time on.
    LoadStage("stage") {
        /// Fetching and reading the checkpoint's files.
        Read = "read",
        /// Compiling kernels, on a GPU.
        Compile = "compile",
        /// Converting and packing the weights or bringing them to the GPU, allocating the KV cache.
        Convert = "convert",
        /// Running the largest step once, and on a GPU others too.
        WarmUp = "warm_up",
        /// Making the KV cache and recording steps, on a GPU.
        Record = "record",
    }
}

label! {
    /// Why a span was not exported.
    SpanDrop("reason") {
        /// More ended than the collector takes.
        QueueFull = "queue_full",
        /// The collector was away, or refused it.
        ExportFailed = "export_failed",
        /// It was left when the program had to end.
        Shutdown = "shutdown",
    }
}

label! {
    /// The class of an HTTP status.
    StatusClass("status") {
        Informational = "1xx",
        Success = "2xx",
        Redirection = "3xx",
        ClientError = "4xx",
        ServerError = "5xx",
    }
}

impl StatusClass {
    /// The class of `status`; anything outside 100..=499 counts as a server's fault.
    pub fn of(status: u16) -> Self {
        match status {
            100..=199 => Self::Informational,
            200..=299 => Self::Success,
            300..=399 => Self::Redirection,
            400..=499 => Self::ClientError,
            _ => Self::ServerError,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indices_match_the_list<L: Label>() {
        for (position, value) in L::ALL.iter().enumerate() {
            assert_eq!(value.index(), position, "{}={}", L::NAME, value.value());
        }
    }

    #[test]
    fn every_label_finds_itself_in_its_list() {
        indices_match_the_list::<FinishedReason>();
        indices_match_the_list::<RejectionReason>();
        indices_match_the_list::<LoadStage>();
        indices_match_the_list::<MemoryPart>();
        indices_match_the_list::<SpanDrop>();
        indices_match_the_list::<StatusClass>();
    }

    #[test]
    fn the_worst_choice_names_the_request() {
        let choices = [FinishedReason::Length, FinishedReason::Error, FinishedReason::Stop];
        assert_eq!(choices.into_iter().max(), Some(FinishedReason::Error));
    }

    #[test]
    fn statuses_fall_into_their_class() {
        assert_eq!(StatusClass::of(200), StatusClass::Success);
        assert_eq!(StatusClass::of(429), StatusClass::ClientError);
        assert_eq!(StatusClass::of(503), StatusClass::ServerError);
        assert_eq!(StatusClass::of(42), StatusClass::ServerError);
    }
}
