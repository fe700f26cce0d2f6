import Foundation
import PhoneBench

let arguments = CommandLine.arguments.dropFirst().map { String($0) }
guard arguments.count >= 2 else {
    FileHandle.standardError.write(Data("usage: phone-bench MODEL PACK [CONTEXT...] > phone.json\n".utf8))
    exit(2)
}
do {
    let urls = arguments.prefix(2).map { URL(fileURLWithPath: $0) }
    let contexts = arguments.dropFirst(2).compactMap { Int($0) }
    let bench = try await PhoneBench(model: urls[0], pack: urls[1])
    FileHandle.standardOutput.write(try bench.result(contexts: contexts.isEmpty ? [1024, 4096] : contexts))
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(2)
}
