//! The HTML page: whole, well-formed, escaped, loading nothing, and of bounded size.

use std::path::Path;

use roxmltree::{Document, Node, ParsingOptions};
use servelab_bench::definitions::DEFINITIONS;
use servelab_bench::report::{self, Details};
use servelab_bench::result::BenchResult;

use crate::fixture::{self, HOSTILE};

/// Renders, keeps both reports to be looked at, and checks what holds for every page.
fn page(name: &str, (result, details): &(BenchResult, Details)) -> String {
    let page = report::html(result, details).unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{name}.html")), &page).unwrap();
    std::fs::write(folder.join(format!("{name}.md")), report::markdown(result, details)).unwrap();
    let document = parse(&page);
    loads_nothing(&document);
    has_no_foreign_elements(&document);
    links_lead_somewhere(&document);
    numbers_are_numbers(&document);
    page
}

/// The page is XML as well, so that whatever is not closed or not escaped is found.
fn parse(page: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, nodes_limit: 1_000_000, ..ParsingOptions::default() };
    Document::parse_with_options(page, options).unwrap_or_else(|error| {
        let line = page.lines().nth(error.pos().row as usize - 1).unwrap_or_default();
        let start: String =
            line.chars().skip((error.pos().col as usize).saturating_sub(80)).take(160).collect();
        panic!("{error}: ...{start}...")
    })
}

fn elements<'a>(document: &'a Document<'a>, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    document.descendants().filter(move |node| node.tag_name().name() == name)
}

fn texts(document: &Document<'_>, name: &'static str) -> Vec<String> {
    let text = |node: Node<'_, '_>| {
        node.descendants().filter(Node::is_text).filter_map(|node| node.text()).collect::<String>()
    };
    elements(document, name).map(|node| text(node).trim().to_owned()).collect()
}

fn loads_nothing(document: &Document<'_>) {
    for node in document.descendants() {
        for attribute in node.attributes() {
            let (name, value) = (attribute.name(), attribute.value());
            assert!(
                !["src", "srcset", "data", "action", "poster", "background"].contains(&name),
                "{name}={value}"
            );
            assert!(!name.starts_with("on"), "{name}={value}");
            assert!(name != "href" || value.starts_with('#'), "{name}={value}");
            assert!(name != "style" || !value.contains("url("), "{name}={value}");
        }
    }
    let policy = elements(document, "meta").find_map(|meta| {
        let is_policy = meta.attribute("http-equiv") == Some("Content-Security-Policy");
        is_policy.then(|| meta.attribute("content"))?
    });
    assert!(policy.unwrap().starts_with("default-src 'none'"), "{policy:?}");
    for own in texts(document, "style").into_iter().chain(texts(document, "script")) {
        // The one address is the name of SVG, which nothing is loaded from.
        let without = own.replace("http://www.w3.org/2000/svg", "");
        for word in ["http:", "https:", "//cdn", "url(", "@import", "fetch(", "XMLHttpRequest", "import("] {
            assert!(!without.contains(word), "the page's own files have {word}");
        }
    }
}

/// Only what the template and the plots are made of: nothing that came with a text.
fn has_no_foreign_elements(document: &Document<'_>) {
    const KNOWN: &[&str] = &[
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "div",
        "span",
        "button",
        "h1",
        "h2",
        "h3",
        "dl",
        "dt",
        "dd",
        "strong",
        "ul",
        "li",
        "nav",
        "a",
        "section",
        "details",
        "summary",
        "p",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "figure",
        "figcaption",
        "i",
        "svg",
        "g",
        "line",
        "rect",
        "circle",
        "path",
        "text",
        "script",
    ];
    for node in document.descendants().filter(Node::is_element) {
        let name = node.tag_name().name();
        assert!(KNOWN.contains(&name), "<{name}> in the page");
    }
    assert_eq!(elements(document, "script").count(), 1);
    assert_eq!(elements(document, "style").count(), 1);
}

fn links_lead_somewhere(document: &Document<'_>) {
    for link in elements(document, "a") {
        let id = link.attribute("href").unwrap().trim_start_matches('#').to_owned();
        let found = document.descendants().filter(|node| node.attribute("id") == Some(&id)).count();
        assert_eq!(found, 1, "#{id}");
    }
}

/// Coordinates that are no numbers draw nothing, and nobody is told.
fn numbers_are_numbers(document: &Document<'_>) {
    for node in document.descendants() {
        for name in
            ["x", "y", "x1", "y1", "x2", "y2", "width", "height", "cx", "cy", "r", "d", "data-x", "data-y"]
        {
            let value = node.attribute(name).unwrap_or_default();
            assert!(!value.contains("NaN") && !value.contains("inf"), "{name}={value}");
        }
    }
}

#[test]
fn a_ladder_shows_everything() {
    let page = page("ladder", &fixture::ladder(16));
    let document = parse(&page);
    let titles = texts(&document, "h2");
    for title in [
        "Levels of load",
        "Measured against the limit",
        "Load: concurrency 16",
        "Failures",
        "Can the figures be trusted?",
        "What was measured, where and when",
        "What the words mean",
    ] {
        assert!(titles.iter().any(|shown| shown == title), "{title} of {titles:?}");
    }
    let figures = texts(&document, "h3");
    for figure in [
        "Throughput against load",
        "TPOT against load",
        "TTFT against load",
        "Throughput of a GPU against speed for a user",
        "TTFT: distribution",
        "ITL: distribution",
        "Requests over time",
        "TTFT over time",
        "ITL over time",
        "Concurrency over time",
        "Output tokens per second over time",
    ] {
        assert!(figures.iter().any(|shown| shown == figure), "{figure} of {figures:?}");
    }
    for (word, meaning) in DEFINITIONS {
        assert!(texts(&document, "dt").iter().any(|shown| shown == word), "{word}");
        assert!(texts(&document, "dd").iter().any(|shown| shown == meaning), "{meaning}");
    }
    // Each level has a section, the best of them open.
    assert_eq!(elements(&document, "details").count(), 4);
    for (figure, svg) in figures.iter().zip(elements(&document, "svg")) {
        assert!(svg.descendants().filter(|node| node.tag_name().name() == "text").count() > 3, "{figure}");
    }
}

#[test]
fn a_single_level_and_a_search_have_their_parts() {
    let single = page("single", &fixture::single());
    assert!(!single.contains("Levels of load"));
    let search = page("search", &fixture::search());
    for part in
        ["Search for the highest rate", "Arrivals and completions over time", "goodput", ">kept<", ">broken<"]
    {
        assert!(search.contains(part), "{part}");
    }
}

#[test]
fn hostile_texts_stay_texts() {
    let page = page("hostile", &fixture::hostile());
    let document = parse(&page);
    // It is shown, as what it is; what no page may hold is replaced.
    let shown = HOSTILE.replace(['\u{0}', '\u{202e}'], "\u{fffd}");
    assert!(texts(&document, "h1").contains(&shown.trim().to_owned()), "{:?}", texts(&document, "h1"));
    assert!(!page.contains("<img") && !page.contains("]]&gt;49"));
    assert!(page.contains("Do not quote these figures") && page.contains("FASTER THAN PHYSICS"));
}

#[test]
fn a_run_in_which_nothing_completed_is_a_report() {
    let page = page("empty", &fixture::empty());
    assert!(page.contains("Nothing was measured") && page.contains("No limits are known"));
    assert!(page.contains("10 of 10 measured requests failed"));
}

/// As many requests as anybody sends, and as many levels as a search may have.
#[test]
fn long_runs_and_many_levels_make_no_large_file() {
    let large = page("large", &fixture::large(100_000));
    assert!(large.len() < 2_000_000, "{} bytes", large.len());
    let (mut result, details) = fixture::ladder(32);
    let points = result.points.clone();
    (0..20).for_each(|_| result.points.extend(points.clone()));
    let many = page("many", &(result, details));
    assert!(many.len() < 2_000_000, "{} bytes", many.len());
}
