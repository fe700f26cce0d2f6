import D2CPack
import Foundation

let usage = """
    usage: d2c-pack list PACK
           d2c-pack verify PACK...
           d2c-pack unpack [--own-ranks] PACK DIRECTORY
           d2c-pack time PACK
    """

func open(_ path: String) throws -> Pack { try Pack(directory: URL(fileURLWithPath: path)) }

func list(_ path: String) throws {
    let pack = try open(path)
    for task in pack.tasks {
        let adapter = try pack.adapter(for: task)
        print(task, adapter.map { "\($0.name) rank \($0.rank) \($0.tensors.count / 2) modules" } ?? "base")
    }
}

/// One line for each pack, for one that is refused a line for each problem, all but the first indented.
func verify(_ paths: [String]) -> Int32 {
    var code: Int32 = 0
    for path in paths {
        do {
            try open(path).verify()
            print("verified")
        } catch {
            print("error: " + "\(error)".replacingOccurrences(of: "\n", with: "\n       "))
            code = 2
        }
    }
    return code
}

/// Time of the processor, so that other programs do not count.
func time(_ path: String) throws {
    func milliseconds(_ work: () throws -> Void) rethrows -> Double {
        let times = try (0..<5).map { _ in
            let start = clock()
            try work()
            return Double(clock() - start) * 1e3 / Double(CLOCKS_PER_SEC)
        }
        return times.sorted()[times.count / 2]
    }
    let pack = try open(path)
    let opened = try milliseconds { _ = try open(path) }
    let read = try milliseconds { for task in pack.tasks { _ = try pack.adapter(for: task) } }
    let n = pack.tasks.count
    print(String(format: "%d tasks, %d bytes: open %.1f ms, read an adapter %.1f ms", n, pack.nBytes,
                 opened, read / Double(n)))
}

do {
    let arguments = Array(CommandLine.arguments.dropFirst())
    let own = arguments.contains("--own-ranks")
    let rest = arguments.filter { $0 != "--own-ranks" }
    switch (rest.first, rest.count) {
    case ("list", 2): try list(rest[1])
    case ("verify", 2...): exit(verify(Array(rest.dropFirst())))
    case ("unpack", 3): try unpack(open(rest[1]), to: URL(fileURLWithPath: rest[2]), ownRanks: own)
    case ("time", 2): try time(rest[1])
    default:
        FileHandle.standardError.write(Data((usage + "\n").utf8))
        exit(2)
    }
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(2)
}
