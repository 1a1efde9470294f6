//! The settings of `servelab up` as typed.

use std::path::PathBuf;

use clap::Args;

pub const EXAMPLES: &str = "\
Examples:
  servelab up                                    two replicas of the demo model, the router, a minute of load
  servelab up --replicas 4 --policy round_robin  the same load under another policy
  servelab up --no-load --port 9000 -- --model smollm2-135m --load-format dummy
  servelab up -- --device sim --hardware h100 --model llama-3.1-8b
  servelab up --load \"--rate 8 --workload shared-prefix --duration 30s\" --end-with-load

Exit codes: 0 ended as asked, 1 failed while running, 2 wrong usage or settings.";

#[derive(Args, Clone, Debug)]
pub struct UpCommand {
    /// Replicas to start.
    #[arg(long, value_name = "COUNT", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub replicas: u8,
    /// Port of the router, on 127.0.0.1; 0 takes a free one and prints it. The replicas take free ones.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// The router's policy [default: that of servelab route].
    #[arg(long, value_name = "NAME")]
    pub policy: Option<String>,
    /// Flags of servelab bench, separated by spaces: the load, once all replicas are ready. --url is given.
    #[arg(
        long,
        value_name = "FLAGS",
        conflicts_with = "no_load",
        allow_hyphen_values = true,
        default_value = "--workload multi-turn --concurrency 8 --lengths clip --duration 60s --repeats 1"
    )]
    pub load: String,
    /// No load.
    #[arg(long)]
    pub no_load: bool,
    /// End all of it once the load has ended, with the load's exit code, in place of serving on.
    #[arg(long, conflicts_with = "no_load")]
    pub end_with_load: bool,
    /// Folder for the logs of the replicas and the router [default: servelab-up in the folder for temporary files].
    #[arg(long, value_name = "FOLDER")]
    pub logs: Option<PathBuf>,
    /// Flags of servelab serve, for every replica, after --.
    #[arg(last = true, value_name = "SERVE FLAGS")]
    pub serve: Vec<String>,
}
