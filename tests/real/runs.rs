//! `sflllm runs` on what real processes have left, or are still at.
#![cfg(unix)]

use serde_json::Value;

use super::place::{Place, Running, TRAIN, contents, told, until};

/// Runs in `runs/` of a place: one complete, one interrupted, one that failed, one whose `run.json` is damaged.
fn place() -> Place {
    let place = Place::new();
    for name in ["complete", "damaged", "stopped"] {
        let words = format!("{TRAIN} --steps 3").replace("@run", &format!("@runs/{name}"));
        let (code, _, said) = place.run(&words);
        assert_eq!(code, Some(0), "{said}");
    }
    std::fs::write(place.path("runs/damaged/run.json"), "{\"start\":").unwrap();
    let file = place.path("runs/stopped/run.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"completed\"", "\"stopped\"")).unwrap();
    let words = format!("{TRAIN} --steps 3 --lr 1e30 --warmup 0").replace("@run", "@runs/failed");
    let (code, _, said) = place.run(&words);
    assert_eq!(code, Some(1), "{said}");
    std::fs::create_dir(place.path("runs/no-run")).unwrap();
    place
}

fn runs(place: &Place, words: &str) -> (Option<i32>, String, String) {
    let mut command = place.program(&format!("runs {words}"));
    told(
        command
            .current_dir(place.0.path())
            .env_remove("DISPLAY")
            .output()
            .unwrap(),
    )
}

fn json(place: &Place, words: &str) -> Value {
    let (code, text, said) = runs(place, &format!("{words} --json"));
    assert_eq!(code, Some(0), "{said}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn runs_are_listed_with_what_became_of_them() {
    let place = place();
    let words = format!("{TRAIN} --steps 10000000").replace("@run", "@runs/going");
    let mut going = Running(place.program(&words).spawn().unwrap());
    until("a step", || {
        std::fs::metadata(place.path("runs/going/metrics.jsonl")).is_ok_and(|file| file.len() > 0)
    });
    let all = json(&place, "list");
    let find = |name: &str| {
        let mut all = all.as_array().unwrap().iter();
        all.find(|run| run["name"] == name)
            .unwrap_or_else(|| panic!("{name} in {all:?}"))
            .clone()
    };
    assert_eq!(all.as_array().unwrap().len(), 5, "{all}");
    for (name, state) in [
        ("complete", "complete"),
        ("damaged", "damaged"),
        ("stopped", "interrupted"),
        ("failed", "failed"),
        ("going", "running"),
    ] {
        let run = find(name);
        assert_eq!(run["state"], state, "{run}");
        assert!(run["bytes"].as_u64().unwrap() > 0, "{run}");
    }
    let complete = find("complete");
    assert_eq!(
        (&complete["steps"], &complete["total_steps"]),
        (&Value::from(3), &Value::from(3))
    );
    assert!(complete["loss"].as_f64().unwrap() > 0.0 && complete["seconds"].as_f64().is_some());
    assert_eq!(
        (&complete["command"], &complete["model"]),
        (&"train".into(), &"demo".into())
    );
    assert_eq!(complete["resume"], Value::Null);
    assert_eq!(find("stopped")["resume"], "sflllm train --resume runs/stopped");
    assert!(
        find("damaged")["reason"]
            .as_str()
            .unwrap()
            .contains("run.json is damaged")
    );
    assert!(find("failed")["reason"].as_str().unwrap().contains("try a lower --lr"));

    let (code, text, said) = runs(&place, "");
    assert_eq!(code, Some(0), "{said}");
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("run ") && lines[0].contains("perplexity"),
        "{text}"
    );
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("complete  complete     train")),
        "{text}"
    );
    assert!(text.contains("damaged does not tell: "), "{text}");

    // Whose process is at it is neither removed nor resumed.
    let (code, _, said) = runs(&place, "rm going --yes");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(&format!("is running (process {})", going.0.id())),
        "{said}"
    );
    going.signal("TERM");
    assert_eq!(going.end().code(), Some(0));
    assert_eq!(json(&place, "show going")["state"], "interrupted");
}

#[test]
fn a_run_is_shown_with_what_can_be_done_next() {
    let place = place();
    let (code, text, said) = runs(&place, "show st");
    assert_eq!(code, Some(0), "{said}");
    for part in [
        "interrupted: stopped",
        "sflllm train --resume runs/stopped",
        "sflllm generate",
        "runs/stopped/adapter",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let shown = json(&place, "show complete");
    assert_eq!(shown["run"]["ended"], "completed");
    let (code, text, said) = runs(&place, "show damaged");
    assert_eq!(code, Some(0), "{said}");
    assert!(text.contains("run.json is damaged"), "{text}");
    let (code, _, said) = runs(&place, "show nothing");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("no run nothing in runs") && said.contains("complete"),
        "{said}"
    );
    let (code, text, said) = runs(&place, "--dir nowhere");
    assert_eq!((code, said.as_str()), (Some(0), ""));
    assert!(text.starts_with("no runs in nowhere"), "{text}");
    let (code, text, _) = runs(&place, "open complete");
    assert_eq!((code, text.trim()), (Some(0), "runs/complete/adapter"));
}

#[test]
fn a_run_is_removed_when_somebody_says_so_and_nothing_else_is() {
    let place = place();
    let before = contents(&place.path("runs"));
    // Nobody is there to be asked.
    let (code, _, said) = runs(&place, "rm complete");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("say --yes"), "{said}");
    assert!(contents(&place.path("runs")) == before);
    std::os::unix::fs::symlink(place.path("runs/complete"), place.path("runs/link")).unwrap();
    let (code, _, said) = runs(&place, "rm link --yes");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("is a link"), "{said}");
    std::fs::remove_file(place.path("runs/link")).unwrap();

    for name in ["complete", "damaged"] {
        let removed = json(&place, &format!("rm {name} --yes"));
        assert_eq!(removed["removed"], format!("runs/{name}"));
        assert!(!place.path(&format!("runs/{name}")).exists());
    }
    std::fs::write(place.path("runs/stopped/mine.txt"), "mine").unwrap();
    let (code, text, said) = runs(&place, "rm stopped --yes");
    assert_eq!(code, Some(0), "{said}");
    assert!(text.contains("was left there"), "{text}");
    let left = contents(&place.path("runs/stopped"));
    assert_eq!(left.keys().collect::<Vec<_>>(), [&place.path("runs/stopped/mine.txt")]);
    assert_eq!(json(&place, "list").as_array().unwrap().len(), 1);
}
