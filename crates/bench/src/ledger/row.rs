//! A row of the ledger: one number that people quote, and what is true of it.

use serde::{Deserialize, Serialize};

use super::calculation::Calculation;
use crate::experiments::ExperimentId;

/// One claim, as the data file has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Short, in lower case, with dashes.
    pub id: String,
    pub topic: Topic,
    /// What is claimed, in one or two sentences.
    pub quoted: String,
    pub source: Source,
    pub standing: Standing,
    /// What is true, in one plain sentence.
    pub verdict: String,
    pub needs: Needs,
    /// What would measure it, in words.
    pub how: String,
    /// What measures it here. Several rows may share one.
    pub experiment: Option<ExperimentId>,
    /// Which findings of the experiment answer this row.
    #[serde(default)]
    pub shows: Vec<String>,
    /// The arithmetic of the claim, with the claim's own inputs.
    #[serde(default)]
    pub arithmetic: Vec<Figure>,
    /// What the chosen model and hardware allow.
    #[serde(default)]
    pub limits: Vec<LimitFigure>,
    #[serde(default)]
    pub published: Vec<Published>,
}

/// A part of a system that claims are about.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Topic {
    Throughput,
    Fleet,
    Memory,
    Latency,
    StartUp,
    Routing,
    Cost,
}

impl Topic {
    pub fn title(self) -> &'static str {
        match self {
            Self::Throughput => "Throughput",
            Self::Fleet => "Size of the fleet",
            Self::Memory => "Memory",
            Self::Latency => "Latency",
            Self::StartUp => "Start-up",
            Self::Routing => "Routing and scaling",
            Self::Cost => "Cost",
        }
    }
}

/// Where a claim stands.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    InterviewChapter,
    DesignDossier,
    JobAdvertisement,
    Publication,
    /// Nobody quotes a number; we ask.
    Question,
}

impl Source {
    pub fn describe(self) -> &'static str {
        match self {
            Self::InterviewChapter => "the interview-day chapter that candidates learn from",
            Self::DesignDossier => "the high-level-design dossier that candidates learn from",
            Self::JobAdvertisement => "a job advertisement",
            Self::Publication => "a published result",
            Self::Question => "no quote: a question of our own",
        }
    }

    /// For a narrow column.
    pub fn short(self) -> &'static str {
        match self {
            Self::InterviewChapter => "interview chapter",
            Self::DesignDossier => "design dossier",
            Self::JobAdvertisement => "job advertisement",
            Self::Publication => "published",
            Self::Question => "our own question",
        }
    }
}

/// How a claim fares.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    Holds,
    /// Right in some circumstances, which it does not name.
    Depends,
    Wrong,
    /// Nothing was claimed.
    Open,
}

impl Standing {
    pub fn word(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Depends => "depends",
            Self::Wrong => "wrong",
            Self::Open => "open",
        }
    }
}

/// What it takes to answer a row.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Needs {
    /// Arithmetic.
    Nothing,
    ThisMachine,
    OneGpu,
    /// Simulated, or a real one.
    Fleet,
    /// To tell which questions mean the same.
    Embeddings,
}

impl Needs {
    pub fn describe(self) -> &'static str {
        match self {
            Self::Nothing => "nothing but arithmetic",
            Self::ThisMachine => "this machine",
            Self::OneGpu => "one GPU",
            Self::Fleet => "a fleet, real or simulated",
            Self::Embeddings => "an embedding model and labelled questions",
        }
    }
}

/// A number that follows from the claim's own inputs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// What it is of, as far as the calculation does not tell.
    pub label: String,
    pub calculation: Calculation,
    /// The value that the ledger was written with, rounded to `place`. A test holds the calculation to it.
    pub figure: f64,
    pub place: f64,
}

/// A number that follows from the chosen model and hardware.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitFigure {
    pub label: String,
    pub calculation: Calculation,
}

/// What somebody else measured or predicted.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    pub kind: PublishedKind,
    pub source: String,
    /// The figure with its circumstances.
    pub text: String,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PublishedKind {
    Measured,
    Predicted,
    /// Computed from a published trace.
    Computed,
}

impl PublishedKind {
    pub fn word(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Predicted => "predicted",
            Self::Computed => "computed from a trace",
        }
    }
}
