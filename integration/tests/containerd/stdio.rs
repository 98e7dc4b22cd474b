//! What goes in and out of a container.

use mvm_integration::containerd::{BUSYBOX, LAYERED, LAYERS};

use crate::context::{Context, Test};

pub(crate) const TESTS: &[Test] = &[
    ("run_passes_output_apart_and_the_exit_code", run),
    ("run_on_a_terminal_has_its_size", terminal),
    ("exec_passes_stdin_output_and_the_exit_code", exec),
    ("exec_on_a_terminal_has_its_size", exec_terminal),
    ("twenty_mib_pass_both_ways_unchanged", bulk),
    ("a_fast_exit_keeps_the_last_bytes", fast_exit),
    ("output_goes_to_a_file_that_a_uri_names", log_uri),
    ("a_program_that_is_not_there_is_named", missing),
    ("a_root_of_a_hundred_layers_is_whole", layers),
];

/// Prints the terminal's size once it is the one of `ctr`'s terminal, which is told after the process has started.
const SIZED: &str = "until stty size 2>&1 | grep -qx '33 77'; do sleep 0.1; done; stty size";

fn run(context: &Context) {
    let output = context.ctr_run(&[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((output.text().as_str(), output.code), ("out\n", Some(7)), "{}", output.stderr);
    assert!(output.stderr.contains("err\n"), "{}", output.stderr);
}

fn terminal(context: &Context) {
    let id = context.id();
    let script = &format!("{SIZED}; test -t 0 && test -t 1 && test -t 2 && echo terminal; exit 5");
    let words = ["run", "--rm", "-t", "--runtime", context.runtime.id(), BUSYBOX, &id, "sh", "-c", script];
    let output = context.ctr.on_terminal(&words);
    let words: Vec<_> = output.text().split_whitespace().map(str::to_owned).collect();
    assert_eq!((words, output.code), (["33", "77", "terminal"].map(str::to_owned).to_vec(), Some(5)));
}

fn exec(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    let exec = context.id();
    let words = ["task", "exec", "--exec-id", &exec, &task.id, "sh", "-c", "cat; echo err >&2; exit 3"];
    let output = context.ctr.feed(&words, b"all of it\n");
    assert_eq!((output.text().as_str(), output.code), ("all of it\n", Some(3)), "{}", output.stderr);
    assert!(output.stderr.contains("err\n"), "{}", output.stderr);
    assert_eq!(
        task.sh("readlink /proc/1/exe; cat /proc/1/cmdline | tr '\\0' ' '"),
        "/bin/busybox\nsleep 1000 "
    );
    task.end();
}

fn exec_terminal(context: &Context) {
    let task = context.start(&[], "exec sleep 1000");
    let exec = context.id();
    let script = format!("{SIZED}; exit 6");
    let words = ["task", "exec", "-t", "--exec-id", &exec, &task.id, "sh", "-c", &script];
    let output = context.ctr.on_terminal(&words);
    assert_eq!((output.text().trim(), output.code), ("33 77", Some(6)), "{}", output.stderr);
    task.end();
}

fn bulk(context: &Context) {
    let block: Vec<u8> = (0..1_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let sent: Vec<u8> = block.iter().copied().cycle().take(20 << 20).collect();
    let id = context.id();
    let output =
        context.ctr.feed(&["run", "--rm", "--runtime", context.runtime.id(), BUSYBOX, &id, "cat"], &sent);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    assert!(output.stdout == sent, "{} bytes came back changed", output.stdout.len());
}

fn fast_exit(context: &Context) {
    for _ in 0..3 {
        let output = context.ctr_run(&[], &["sh", "-c", "head -c 300000 /dev/zero; echo last words"]);
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        assert_eq!(output.stdout.len(), 300_011);
        assert!(output.stdout.ends_with(b"last words\n"));
    }
}

fn log_uri(context: &Context) {
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("log");
    std::fs::write(&log, "before\n").expect("a file");
    let uri = format!("file://{}", log.display());
    let task = context.start_with(&["--log-uri", &uri], "echo out; echo err >&2; exit 4");
    task.ended();
    assert_eq!(task.delete(), 4);
    let text = std::fs::read_to_string(&log).expect("text");
    assert!(text.starts_with("before\n") && text.contains("out\n") && text.contains("err\n"), "{text}");
}

fn missing(context: &Context) {
    let output = context.ctr_run(&[], &["/no/such/program"]);
    assert_ne!(output.code, Some(0));
    assert!(output.stderr.contains("/no/such/program"), "{}", output.stderr);
}

fn layers(context: &Context) {
    let id = context.id();
    let script = "ls /layers | wc -l; cat /layers/top; echo; cat /layers/1; echo; ls /bin/busybox";
    let words = ["run", "--rm", "--runtime", context.runtime.id(), LAYERED, &id, "sh", "-c", script];
    let expected = format!("{LAYERS}\n{}\n1\n/bin/busybox\n", LAYERS - 1);
    assert_eq!(context.ctr.must(&words), expected);
}
